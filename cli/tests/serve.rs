//! `serve` speaks OpenAI's HTTP API: what it answers, what it refuses, and what happens when a client goes away.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Running, children, fixture, is_gone, refuse, signal, start, stepmesh, within};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// A server, and where it listens.
struct Server {
    process: Running,
    address: String,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let process = start(stepmesh(&[&["serve", "--port", "0"], arguments].concat()));
        let line = process.wait_for(|line| line.starts_with("serving "));
        let address = line.strip_prefix("serving http://").unwrap().strip_suffix("/v1").unwrap().to_owned();
        Self { process, address }
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        stream
    }

    /// The status, the head and the body of an answer.
    fn raw(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, String) {
        let mut answer = String::new();
        self.send(method, path, headers, body).read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = if head.to_lowercase().contains("transfer-encoding: chunked") { unchunk(body) } else { body.into() };
        (status, head.to_owned(), body)
    }

    fn get(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.raw("GET", path, "", b"");
        (status, body)
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, _, answer) = self.raw("POST", path, JSON, body.to_string().as_bytes());
        (status, serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{answer}")))
    }

    /// The frames of a stream.
    fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = json!(true);
        let (status, head, answer) = self.raw("POST", path, JSON, body.to_string().as_bytes());
        assert!(status == 200 && head.contains("text/event-stream"), "{head}{answer}");
        let mut frames: Vec<&str> = answer.split("\n\n").filter(|frame| !frame.is_empty()).collect();
        assert_eq!(frames.pop(), Some("data: [DONE]"));
        frames.iter().map(|frame| serde_json::from_str(frame.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }

    fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }
}

const JSON: &str = "Content-Type: application/json\r\n";

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        whole.push_str(&rest[..length]);
        body = rest[length..].strip_prefix("\r\n").unwrap_or_default();
    }
    whole
}

const PROMPT: &str = "Once there was a girl named Anna who lived by the";

#[test]
fn completions_and_chat_are_answered_whole_and_in_pieces() {
    let server = Server::start(&[]);
    let ask = json!({"model": "step3-story", "prompt": PROMPT, "max_tokens": 40, "temperature": 0});
    let (status, whole) = server.post("/v1/completions", &ask);
    assert_eq!((status, &whole["object"]), (200, &json!("text_completion")), "{whole}");
    let text = whole["choices"][0]["text"].as_str().unwrap();
    assert!(text.contains("Anna") && text.contains(". "), "{text}");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let usage = &whole["usage"];
    assert_eq!(usage["completion_tokens"], 40);
    assert_eq!(usage["total_tokens"], usage["prompt_tokens"].as_u64().unwrap() + 40);

    let mut streamed = ask.clone();
    streamed["stream_options"] = json!({"include_usage": true});
    let frames = server.stream("/v1/completions", streamed);
    let pieces: String = frames.iter().filter_map(|frame| frame["choices"][0]["text"].as_str()).collect();
    assert_eq!(pieces, text);
    assert!(frames.len() > 20, "{} frames", frames.len());
    assert_eq!(frames.last().unwrap()["usage"], *usage);
    assert_eq!(frames[frames.len() - 2]["choices"][0]["finish_reason"], "length");

    let stop = text.find(". ").unwrap();
    let mut stopped = ask.clone();
    stopped["stop"] = json!(["no such words", ". "]);
    stopped["echo"] = json!(true);
    let (_, answer) = server.post("/v1/completions", &stopped);
    assert_eq!(answer["choices"][0]["text"], format!("{PROMPT}{}", &text[..stop]));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");

    let chat =
        json!({"messages": [{"role": "user", "content": "Tell me a story about Tom and a key."}], "temperature": 0});
    let (status, whole) = server.post("/v1/chat/completions", &chat);
    assert_eq!((status, &whole["object"]), (200, &json!("chat.completion")), "{whole}");
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["role"], &whole["choices"][0]["finish_reason"]), (&json!("assistant"), &json!("stop")));
    let said = message["content"].as_str().unwrap();
    assert!(said.contains("Tom") && said.contains("key") && said.ends_with('.'), "{said}");
    let frames = server.stream("/v1/chat/completions", chat);
    assert_eq!(frames[0]["choices"][0]["delta"]["role"], "assistant");
    let pieces: String = frames.iter().filter_map(|frame| frame["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(pieces, said);
    assert_eq!(frames.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[test]
fn token_ids_go_to_a_model_without_a_tokenizer_and_choices_are_told_apart() {
    let checkpoint = fixture();
    let server = Server::start(&["--checkpoint", checkpoint.to_str().unwrap(), "--dtype", "f32", "--ffn", "2"]);
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(checkpoint.join("golden_f32.json")).unwrap()).unwrap();
    let first = |case: usize| -> String {
        let ids = golden[case]["greedy"].as_array().unwrap()[..8].iter().map(Value::to_string);
        ids.collect::<Vec<_>>().join(" ")
    };
    let prompts = json!([golden[0]["prompt"], golden[1]["prompt"]]);
    let ask = json!({"model": "step3-tiny", "prompt": prompts, "max_tokens": 8, "temperature": 0, "n": 2, "ignore_eos": true});
    let (status, answer) = server.post("/v1/completions", &ask);
    assert_eq!(status, 200, "{answer}");
    let texts: Vec<&str> = answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, [first(0), first(0), first(1), first(1)]);

    let draw = |seed: u64| {
        let ask = json!({"prompt": [0, 5], "max_tokens": 12, "seed": seed, "n": 2, "ignore_eos": true});
        let choices = server.post("/v1/completions", &ask).1["choices"].clone();
        (choices[0]["text"].clone(), choices[1]["text"].clone())
    };
    let (a, b) = draw(7);
    assert_eq!((a.clone(), b.clone()), draw(7));
    assert_ne!(a, b);
    assert_ne!(a, draw(8).0);
    let (status, refused) = server.post("/v1/completions", &json!({"prompt": "text"}));
    assert!(status == 400 && refused["error"]["message"].as_str().unwrap().contains("no tokenizer"), "{refused}");
}

#[test]
fn what_cannot_be_answered_is_refused_in_openais_shape_and_disturbs_nobody() {
    let server = Server::start(&["--api-key", "open-sesame", "--max-requests", "4"]);
    let key = "Authorization: Bearer open-sesame\r\n";
    let headers = format!("{JSON}{key}");
    let (status, _, body) = server.raw("POST", "/v1/completions", JSON, b"{}");
    assert!(status == 401 && body.contains("invalid_api_key") && !body.contains("sesame"), "{body}");
    let (status, _, _) = server.raw("GET", "/v1/models", "Authorization: Bearer open\r\n", b"");
    assert_eq!(status, 401);
    let huge = vec![b' '; 2 << 20];
    let long = json!({"prompt": PROMPT, "max_tokens": 600}).to_string();
    let cases: [(&str, &str, &[u8], u16, &str); 9] = [
        ("POST", "/v1/completions", b"{\"prompt\": ", 400, "not JSON"),
        ("POST", "/v1/completions", b"[1]", 400, "not a JSON object"),
        ("POST", "/v1/completions", b"{\"prompt\": {\"a\": 1}}", 400, "`prompt`"),
        ("POST", "/v1/completions", long.as_bytes(), 400, "context_length_exceeded"),
        ("POST", "/v1/chat/completions", b"{\"model\": \"gpt\", \"messages\": []}", 404, "model_not_found"),
        ("POST", "/v1/chat/completions", &huge, 413, "larger than"),
        ("GET", "/v1/completions", b"", 405, "does not take GET"),
        ("GET", "/v1/models/gpt", b"", 404, "model_not_found"),
        ("GET", "/v2", b"", 404, "there is no /v2 here"),
    ];
    for (method, path, body, code, named) in cases {
        let (status, _, answer) = server.raw(method, path, &headers, body);
        assert_eq!(status, code, "{path}: {answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{path}: {answer}"));
        assert!(answer["error"]["message"].is_string() && answer["error"]["type"].is_string(), "{answer}");
        assert!(answer.to_string().contains(named), "{path}: {answer}");
    }
    let (status, _, models) = server.raw("GET", "/v1/models", key, b"");
    assert!(status == 200 && models.contains("step3-story"), "{models}");
    assert_eq!(server.get("/health"), (200, r#"{"status":"ok"}"#.into()));

    // A client that never reads holds one request, no more; one that goes away holds none.
    let endless = json!({"prompt": PROMPT, "max_tokens": 480, "ignore_eos": true, "stream": true, "n": 8}).to_string();
    let deaf = server.send("POST", "/v1/completions", &headers, endless.as_bytes());
    let mut brief = BufReader::new(server.send("POST", "/v1/completions", &headers, endless.as_bytes()));
    let mut line = String::new();
    while !line.contains("data: ") {
        line.clear();
        brief.read_line(&mut line).unwrap();
    }
    drop(brief);
    let patience = Duration::from_secs(30);
    assert!(within(patience, || server.metric("stepmesh_cancelled_choices_total") >= 8.0), "nothing was cancelled");
    let (status, _, answer) = server.raw("POST", "/v1/completions", &headers, br#"{"prompt": "Tom", "max_tokens": 3}"#);
    assert_eq!(status, 200, "{answer}");
    drop(deaf);
    assert!(within(patience, || server.metric("stepmesh_running_choices") == 0.0), "something still runs");
}

#[test]
fn one_request_too_many_is_told_to_come_again() {
    let server = Server::start(&["--max-requests", "1"]);
    let endless = json!({"prompt": PROMPT, "max_tokens": 480, "ignore_eos": true, "stream": true, "n": 16}).to_string();
    let mut busy = BufReader::new(server.send("POST", "/v1/completions", JSON, endless.as_bytes()));
    let mut line = String::new();
    busy.read_line(&mut line).unwrap();
    let (status, head, answer) = server.raw("POST", "/v1/completions", JSON, br#"{"prompt": "Tom"}"#);
    assert!(status == 429 && head.to_lowercase().contains("retry-after: 1"), "{head}{answer}");
    drop(busy);
    let free = || server.post("/v1/completions", &json!({"prompt": "Tom", "max_tokens": 1})).0 == 200;
    assert!(within(Duration::from_secs(30), free));
}

#[test]
fn a_server_leaves_nothing_behind_and_can_front_a_deployment_that_runs() {
    let up = start(stepmesh(&["up", "--attention", "1", "--ffn", "1"]));
    let url = up.wait_for(|line| line.starts_with("ready ")).strip_prefix("ready ").unwrap().to_owned();
    let mut server = Server::start(&["--scheduler", &url]);
    assert_eq!(children(server.process.pid()).len(), 0);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "Tom is", "max_tokens": 4})).0, 200);
    signal(up.pid(), "-TERM");
    assert!(within(Duration::from_secs(30), || server.get("/health").0 == 503));
    let (status, answer) = server.post("/v1/completions", &json!({"prompt": "Tom is"}));
    assert_eq!((status, &answer["error"]["type"]), (503, &json!("server_error")), "{answer}");
    signal(server.process.pid(), "-TERM");
    assert_eq!(server.process.wait().0, Some(0));

    let mut own = Server::start(&[]);
    let processes = children(own.process.pid());
    assert_eq!(processes.len(), 3);
    signal(own.process.pid(), "-INT");
    assert_eq!(own.process.wait().0, Some(0), "{}", own.process.rest_of_errors());
    assert!(processes.iter().all(|process| is_gone(process.pid)));
}

#[test]
fn a_server_that_strangers_could_reach_wants_a_key() {
    let said = refuse(2, stepmesh(&["serve", "--host", "0.0.0.0", "--port", "0"]));
    assert!(said.contains("--api-key-file"), "{said}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let said = refuse(2, stepmesh(&["serve", "--port", &port]));
    assert!(said.contains(&port) && said.contains("--port"), "{said}");
}
