//! The control plane over loopback: members, clients and a scheduler, and what disturbs them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod control_world;

use control_world::{Member, hello, options, serve, session, soon, spawn_member_process};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};
use stepmesh_mesh::control::{BlockingClient, Client, ConnectOptions, Control, ControlError, GrpcControl, Token};
use stepmesh_mesh::scheduler::{SchedulerOptions, ServeError, ServeOptions, Server, spawn};
use stepmesh_proto::control::from_member::Body as Said;
use stepmesh_proto::control::generate_event::Body as Progress;
use stepmesh_proto::control::to_member::Body;
use stepmesh_proto::control::{
    BarrierEnter, Failed, Finished, GenerateRequest, Hello, LinkGrants, LinkOffer, LinkUp, MemberStats, Role,
    SequenceEvent, StartSequence, Token as Decoded, failed, sequence_event,
};

/// A 1A1F deployment whose link is up.
fn complete(url: &str) -> (Member, Member) {
    let (mut attention, mut ffn) = (Member::join(url, Role::Attention), Member::join(url, Role::Ffn));
    for member in [&mut attention, &mut ffn] {
        let incarnation =
            member.expect(|body| if let Body::OpenLink(open) = body { Some(open.incarnation) } else { None });
        member.say(Said::LinkUp(LinkUp { incarnation }));
    }
    for member in [&mut attention, &mut ffn] {
        member.expect(|body| matches!(body, Body::Epoch(epoch) if epoch.complete).then_some(()));
    }
    (attention, ffn)
}

fn lost(body: Body) -> Option<(u32, String)> {
    if let Body::PeerLost(lost) = body { Some((lost.peer.unwrap().rank, lost.reason)) } else { None }
}

#[test]
fn members_join_and_exchange_descriptors() {
    let scheduler = serve(1, 1);
    let (mut attention, mut ffn) =
        (Member::join(&scheduler.url(), Role::Attention), Member::join(&scheduler.url(), Role::Ffn));
    let opened = |body| if let Body::OpenLink(open) = body { Some(open) } else { None };
    let (open, other) = (attention.expect(opened), ffn.expect(opened));
    assert_eq!((open.incarnation, &open.secret, open.secret.len()), (other.incarnation, &other.secret, 16));
    let incarnation = open.incarnation;
    attention.say(Said::LinkOffer(LinkOffer { incarnation, descriptor: vec![1, 2] }));
    let offer = ffn.expect(|body| if let Body::LinkOffer(offer) = body { Some(offer) } else { None });
    assert_eq!(offer.descriptor, [1, 2]);
    ffn.say(Said::LinkGrants(LinkGrants { incarnation, descriptors: vec![vec![3; 4096]; 64] }));
    let grants = attention.expect(|body| if let Body::LinkGrants(grants) = body { Some(grants) } else { None });
    assert_eq!(grants.descriptors.len(), 64);
}

#[test]
fn a_killed_process_is_seen_at_once_and_replaced() {
    let scheduler = serve(1, 1);
    let mut attention = Member::join(&scheduler.url(), Role::Attention);
    let mut process = spawn_member_process(&scheduler.url());
    attention.expect(|body| matches!(body, Body::OpenLink(_)).then_some(()));
    let killed = Instant::now();
    process.kill().unwrap();
    let (rank, reason) = attention.expect(lost);
    assert!(killed.elapsed() < Duration::from_secs(1), "seen after {:?}: {reason}", killed.elapsed());
    assert_eq!(rank, 0);
    process.wait().unwrap();
    Member::join(&scheduler.url(), Role::Ffn);
}

#[test]
fn a_process_that_hangs_is_lost_for_its_silence() {
    let mut options = options(1, 1);
    options.deployment.heartbeat = Duration::from_millis(50);
    options.deployment.loss = Duration::from_millis(500);
    let scheduler = spawn(options).unwrap();
    let mut attention = Member::join(&scheduler.url(), Role::Attention);
    let mut process = spawn_member_process(&scheduler.url());
    attention.expect(|body| matches!(body, Body::OpenLink(_)).then_some(()));
    std::thread::sleep(Duration::from_millis(1200));
    assert!(attention.quiet(lost), "heartbeats keep both alive");
    std::process::Command::new("kill").args(["-STOP", &process.id().to_string()]).status().unwrap();
    let (_, reason) = attention.expect(lost);
    assert!(reason.contains("nothing was heard of it for 500ms"), "{reason}");
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
#[ignore = "a member for the tests that kill one"]
fn member_process() {
    let Ok(url) = std::env::var("CONTROL_TEST_SCHEDULER") else { return };
    let _member = Member::join(&url, Role::Ffn);
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_member_that_is_dropped_says_good_bye() {
    let scheduler = serve(1, 1);
    let (mut attention, ffn) = complete(&scheduler.url());
    let dropped = Instant::now();
    drop(ffn);
    assert!(dropped.elapsed() < Duration::from_millis(900), "dropping took {:?}", dropped.elapsed());
    assert_eq!(attention.expect(lost).1, "it closed its session");
}

#[test]
fn a_member_hears_why_it_is_refused() {
    let scheduler = serve(1, 1);
    let mut member = Member::connect(&scheduler.url());
    member.say(Said::Hello(Hello { control_version: 99, ..hello(Role::Ffn) }));
    let reason = member.expect(|body| if let Body::Refused(refused) = body { Some(refused.reason) } else { None });
    assert!(reason.contains("version 2 of the control protocol, the member version 99"), "{reason}");
    assert_eq!(member.lost(), reason);
    assert!(member.control.poll().is_none());
    assert!(matches!(member.control.send(session(Said::Heartbeat(Default::default()))), Err(ControlError::Lost(_))));
}

#[test]
fn a_scheduler_that_ends_drains_its_members_and_they_know() {
    let scheduler = serve(1, 1);
    let (mut attention, _ffn) = complete(&scheduler.url());
    drop(scheduler);
    attention.expect(|body| matches!(body, Body::Drain(_)).then_some(()));
    attention.lost();
}

#[test]
fn calls_without_the_token_are_refused() {
    let mut options = options(1, 1);
    options.token = Some(Token::new("swordfish").unwrap());
    let scheduler = spawn(options).unwrap();
    let connect = |token: Option<&str>| {
        let token = token.map(|token| Token::new(token).unwrap());
        let options = ConnectOptions::new(scheduler.url()).token(token);
        GrpcControl::connect(options.clone(), Box::new(|| {})).map(drop)?;
        BlockingClient::connect(&options)?.status()
    };
    let wrong = connect(Some("sword")).unwrap_err();
    assert!(matches!(wrong, ControlError::Unauthenticated { .. }) && wrong.to_string().contains("token is wrong"));
    let missing = connect(None).unwrap_err();
    assert!(matches!(missing, ControlError::Unauthenticated { .. }) && missing.to_string().contains("none was shown"));
    connect(Some("swordfish")).unwrap();
}

#[tokio::test]
async fn every_call_asks_for_the_token() {
    use stepmesh_proto::control::scheduler_client::SchedulerClient;
    let mut options = options(1, 1);
    options.token = Some(Token::new("swordfish").unwrap());
    let scheduler = spawn(options).unwrap();
    let endpoint = tonic::transport::Endpoint::from_shared(scheduler.url()).unwrap();
    let mut stub = SchedulerClient::new(endpoint.connect().await.unwrap());
    let codes = [
        stub.join(tokio_stream::empty()).await.map(drop),
        stub.generate(GenerateRequest::default()).await.map(drop),
        stub.status(stepmesh_proto::control::StatusRequest {}).await.map(drop),
        stub.stats(stepmesh_proto::control::StatsRequest::default()).await.map(drop),
    ];
    assert!(
        codes.iter().all(|code| code.as_ref().is_err_and(|s| s.code() == tonic::Code::Unauthenticated)),
        "{codes:?}"
    );
    drop(stub);
    tokio::task::spawn_blocking(move || drop(scheduler)).await.unwrap();
}

#[test]
fn an_address_that_others_can_reach_needs_a_token() {
    let open = ServeOptions { listen: "0.0.0.0:0".parse().unwrap(), ..options(1, 1) };
    let refused = spawn(open.clone()).unwrap_err();
    assert!(matches!(refused, ServeError::Open { .. }) && refused.to_string().contains("--insecure"));
    spawn(ServeOptions { token: Some(Token::new("swordfish").unwrap()), ..open.clone() }).unwrap();
    spawn(ServeOptions { insecure: true, ..open }).unwrap();
}

#[test]
fn a_port_in_use_is_named() {
    let scheduler = serve(1, 1);
    let refused = spawn(ServeOptions { listen: scheduler.address(), ..options(1, 1) }).unwrap_err();
    assert!(matches!(refused, ServeError::InUse { .. }));
    assert!(refused.to_string().contains(&scheduler.address().to_string()), "{refused}");
}

#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let scheduler = serve(1, 1);
    let (mut attention, ffn) = complete(&scheduler.url());
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut held = Vec::new();
    for round in 0..100_u32 {
        let mut stream = TcpStream::connect(scheduler.address()).unwrap();
        let noise: Vec<u8> = (0..4096_u32).map(|at| (at.wrapping_mul(2_654_435_761 ^ round) >> 13) as u8).collect();
        match round % 4 {
            0 => stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap(),
            1 => stream.write_all(&noise).unwrap(),
            2 => drop(stream.write_all(preface).and_then(|()| stream.write_all(&noise))),
            _ => {}
        }
        held.push(stream);
    }
    assert!(BlockingClient::connect(&ConnectOptions::new(scheduler.url())).unwrap().status().unwrap().complete);
    assert!(attention.quiet(lost));
    drop(ffn);
    attention.expect(lost);
}

#[test]
fn a_giant_message_costs_its_sender_the_session_and_nobody_else() {
    let scheduler = serve(1, 1);
    let (mut attention, mut ffn) = complete(&scheduler.url());
    ffn.say(Said::LinkOffer(LinkOffer { incarnation: 1, descriptor: vec![0; 20 << 20] }));
    let (_, reason) = attention.expect(lost);
    assert!(reason.contains("too large"), "{reason}");
    ffn.lost();
    Member::join(&scheduler.url(), Role::Ffn);
}

#[test]
fn a_member_that_does_not_read_is_lost() {
    let scheduler = serve(1, 1);
    let (mut attention, mut ffn) = complete(&scheduler.url());
    let deadline = soon();
    loop {
        let enter = BarrierEnter { name: "x".repeat(256), group: 1 };
        match attention.control.send(session(Said::BarrierEnter(enter))) {
            Ok(()) => {}
            Err(ControlError::Full(_)) => std::thread::sleep(Duration::from_millis(1)),
            Err(_) => break,
        }
        let told = ffn.next().and_then(lost);
        if let Some((_, reason)) = told {
            assert!(reason.contains("does not read"), "{reason}");
            break;
        }
        assert!(Instant::now() < deadline, "still a member");
    }
}

#[test]
fn sessions_are_limited() {
    let scheduler = spawn(ServeOptions { max_sessions: 1, ..options(1, 1) }).unwrap();
    let first = Member::join(&scheduler.url(), Role::Ffn);
    let refused = GrpcControl::connect(ConnectOptions::new(scheduler.url()), Box::new(|| {})).unwrap_err();
    assert!(
        matches!(&refused, ControlError::Overloaded(reason) if reason.contains("1 sessions are open")),
        "{refused}"
    );
    drop(first);
    Member::join(&scheduler.url(), Role::Ffn);
}

#[test]
fn a_scheduler_that_is_not_there_yet_is_waited_for() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let patient = ConnectOptions::new(address.to_string()).timeout(Duration::from_millis(300));
    let refused = GrpcControl::connect(patient.clone(), Box::new(|| {})).unwrap_err();
    assert!(matches!(refused, ControlError::Unreachable { .. }));
    assert!(refused.to_string().contains(&format!("http://{address}")), "{refused}");
    let member = std::thread::spawn(move || {
        GrpcControl::connect(patient.timeout(Duration::from_secs(10)), Box::new(|| {})).map(drop)
    });
    std::thread::sleep(Duration::from_millis(300));
    let scheduler = spawn(ServeOptions { listen: address, ..options(1, 1) }).unwrap();
    member.join().unwrap().unwrap();
    drop(scheduler);
}

#[test]
fn somebody_else_on_the_port_is_not_taken_for_a_scheduler() {
    for answer in [&b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"[..], b"SSH-2.0-x\r\n"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let mut heard = [0; 24];
                drop(stream.read_exact(&mut heard).and_then(|()| stream.write_all(answer)));
            }
        });
        let refused = BlockingClient::connect(&ConnectOptions::new(address.to_string())).unwrap_err();
        assert!(matches!(refused, ControlError::NotScheduler { .. }), "{refused}");
    }
    for address in ["ftp://x:1", "https://127.0.0.1:1", "", "http://"] {
        let refused = BlockingClient::connect(&ConnectOptions::new(address)).unwrap_err();
        assert!(matches!(refused, ControlError::Address { .. }), "{address}: {refused}");
    }
}

#[test]
fn a_scheduler_of_another_release_is_refused_with_both_versions() {
    let url = control_world::serve_other_release();
    let refused = GrpcControl::connect(ConnectOptions::new(url), Box::new(|| {})).unwrap_err();
    assert!(matches!(refused, ControlError::Version { protocol: "control", ours: 2, theirs: 77, .. }), "{refused}");
}

#[test]
fn a_prompt_is_decoded_by_the_attention_member_and_streamed_to_the_client() {
    let scheduler = serve(1, 1);
    let client = BlockingClient::connect(&ConnectOptions::new(scheduler.url())).unwrap();
    let prompt = GenerateRequest { prompt: vec![7, 8], max_new_tokens: 2, ..Default::default() };
    let refused = client.generate(prompt.clone()).unwrap_err();
    assert!(matches!(&refused, ControlError::NotReady(reason) if reason.contains("0 of 1 attention")), "{refused}");
    let waited = client.wait_complete(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(waited, ControlError::NotReady(_)), "{waited}");

    let (mut attention, _ffn) = complete(&scheduler.url());
    client.wait_complete(Duration::from_secs(5)).unwrap();
    let far = client.generate(GenerateRequest { attention_rank: Some(4), ..prompt.clone() }).unwrap_err();
    assert!(matches!(far, ControlError::Refused(_)), "{far}");

    let events = client.generate(prompt.clone()).unwrap();
    let StartSequence { sequence, request } = attention.expect(started);
    assert_eq!(request.unwrap(), prompt);
    for token in [5, 6] {
        attention.report(sequence, sequence_event::Body::Token(Decoded { token, ..Default::default() }));
    }
    attention.report(sequence, sequence_event::Body::Finished(Finished { reason: 0, tokens: 2 }));
    let events: Vec<_> = events.map(|event| event.unwrap()).collect();
    let [Progress::Token(first), Progress::Token(second), Progress::Finished(_)] = events.as_slice() else {
        panic!("{events:?}")
    };
    assert_eq!((first.token, second.token), (5, 6));

    let mut events = client.generate(prompt.clone()).unwrap();
    let StartSequence { sequence, .. } = attention.expect(started);
    let failed = Failed { kind: failed::Kind::Invalid.into(), message: "too long".to_owned() };
    attention.report(sequence, sequence_event::Body::Failed(failed.clone()));
    assert_eq!(events.next().unwrap().unwrap(), Progress::Failed(failed));
    assert!(events.next().is_none());

    drop(client.generate(prompt.clone()).unwrap());
    let StartSequence { sequence, .. } = attention.expect(started);
    attention.expect(|body| matches!(body, Body::CancelSequence(cancel) if cancel.sequence == sequence).then_some(()));

    let mut events = client.generate(prompt).unwrap();
    attention.expect(started);
    drop(attention);
    let Progress::Failed(failed) = events.next().unwrap().unwrap() else { panic!() };
    assert_eq!(failed.kind(), failed::Kind::PeerLost);
    assert!(failed.message.contains("attention rank 0 (host, pid 42)"), "{}", failed.message);
}

fn started(body: Body) -> Option<StartSequence> {
    if let Body::StartSequence(start) = body { Some(start) } else { None }
}

impl Member {
    fn report(&mut self, sequence: u64, body: sequence_event::Body) {
        self.say(Said::SequenceEvent(SequenceEvent { sequence, body: Some(body) }));
    }
}

#[test]
fn a_client_hears_when_the_scheduler_is_lost() {
    let scheduler = serve(1, 1);
    let (_attention, _ffn) = complete(&scheduler.url());
    let client = BlockingClient::connect(&ConnectOptions::new(scheduler.url())).unwrap();
    let mut events = client.generate(GenerateRequest { prompt: vec![1], ..Default::default() }).unwrap();
    drop(scheduler);
    let lost = events.next().unwrap().unwrap_err();
    assert!(matches!(lost, ControlError::Lost(_)), "{lost}");
    assert!(matches!(client.status().unwrap_err(), ControlError::Lost(_)));
}

#[test]
fn figures_come_from_the_attention_members() {
    let scheduler = serve(1, 1);
    let (mut attention, _ffn) = complete(&scheduler.url());
    let url = scheduler.url();
    let asked = std::thread::spawn(move || BlockingClient::connect(&ConnectOptions::new(url))?.stats(true));
    let ask = attention.expect(|body| if let Body::ReportStats(ask) = body { Some(ask) } else { None });
    assert!(ask.reset);
    attention.say(Said::Stats(MemberStats { request: ask.request, tokens: 9, ..Default::default() }));
    let reply = asked.join().unwrap().unwrap();
    assert_eq!(reply.members.iter().map(|stats| stats.tokens).collect::<Vec<_>>(), [9]);
}

#[tokio::test]
async fn async_callers_are_served_and_blocking_calls_among_them_refused() {
    let server = Server::bind(ServeOptions::new(SchedulerOptions::new(1, 1))).await.unwrap();
    let connect = ConnectOptions::new(server.address().to_string());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.run(async { drop(stopped.await) }));
    let client = Client::connect(&connect).await.unwrap();
    assert_eq!(client.status().await.unwrap().attention, 1);
    assert!(matches!(BlockingClient::connect(&connect), Err(ControlError::System(_))));
    drop(stop);
    serving.await.unwrap().unwrap();
}
