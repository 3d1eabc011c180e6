//! The report's page as a browser shows it: every plot is there, its texts are large enough and do not overlap, and each can
//! be saved as a file.

#![allow(clippy::unwrap_used)]

mod common;

use common::run;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// Appended to a copy of the page: says what a reader would see.
const PROBE: &str = r#"<script>addEventListener("load", () => setTimeout(() => {
    const seen = { plots: 0, texts: 0, overlaps: [], outside: [], tiny: [], files: [], blank: [] };
    for (const figure of document.querySelectorAll("figure")) {
        const svg = figure.querySelector("svg"), frame = svg.getBoundingClientRect(), name = figure.dataset.name;
        seen.plots += 1;
        const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
        texts.forEach(([said, box], index) => {
            seen.texts += 1;
            if (box.height < 9) seen.tiny.push(`${name}: ${said}`);
            if (box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom)
                seen.outside.push(`${name}: ${said}`);
            for (const [other, next] of texts.slice(index + 1)) {
                const across = Math.min(box.right, next.right) - Math.max(box.left, next.left);
                const down = Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top);
                // A line's box is a little higher than its letters.
                if (across > 1 && down > 4) seen.overlaps.push(`${name}: ${said} | ${other}`);
            }
        });
        if (svg.querySelectorAll("path, polyline, line, rect, circle").length < 3) seen.blank.push(name);
        for (const link of figure.querySelectorAll("a"))
            seen.files.push([link.download, link.href.slice(0, 15), link.href.length > 1000]);
    }
    const told = document.createElement("pre");
    told.id = "seen";
    told.textContent = JSON.stringify(seen);
    document.body.append(told);
}, 1000));</script>"#;

fn browser() -> Option<&'static str> {
    let starts = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    ["chromium", "chromium-browser", "google-chrome"].into_iter().find(starts)
}

/// What the browser says of a page.
fn open(browser: &str, page: &Path, dir: &Path) -> Value {
    let probed = dir.join("probed.html");
    std::fs::write(&probed, std::fs::read_to_string(page).unwrap() + PROBE).unwrap();
    let profile = format!("--user-data-dir={}", dir.join("profile").display());
    let options =
        ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--virtual-time-budget=10000"];
    let output = Command::new(browser).args(options).args([&profile, "--dump-dom"]).arg(&probed).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let seen = shown.split_once("<pre id=\"seen\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let (seen, _) = seen.unwrap_or_else(|| panic!("{shown}\n{}", String::from_utf8_lossy(&output.stderr)));
    serde_json::from_str(&seen.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")).unwrap()
}

#[test]
fn a_browser_shows_every_plot_with_texts_that_do_not_overlap_and_offers_it_as_a_file() {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        return println!("skipped: one CPU");
    }
    let Some(browser) = browser() else {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "chromium is not installed");
        return println!("skipped: chromium is not installed");
    };
    let dir = tempfile::tempdir().unwrap();
    let (mut report, page) = (vec!["bench".into(), "report".into()], dir.path().join("bench.html"));
    for suite in [
        &["transport", "--provider", "shm", "--peers", "none"][..],
        &["pushpull"],
        &["pipeline", "--clock", "virtual"],
        &["scaling", "--members", "1,2,16"],
        &["model", "--new-tokens", "8", "--python", "/nowhere/python"],
    ] {
        let file = dir.path().join(format!("{}.json", suite[0])).display().to_string();
        let output = run(&[&["bench"], suite, &["--quick", "--json", &file]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        report.push(file);
    }
    report.extend(["--html".into(), page.display().to_string()]);
    let output = run(&report.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let seen = open(browser, &page, dir.path());
    let plots = seen["plots"].as_u64().unwrap();
    assert!(plots >= 8 && seen["texts"].as_u64().unwrap() > 10 * plots, "{seen}");
    for fault in ["overlaps", "outside", "tiny", "blank"] {
        assert_eq!(seen[fault].as_array().unwrap().len(), 0, "{fault}: {:#}", seen[fault]);
    }
    let files = seen["files"].as_array().unwrap();
    assert_eq!(files.len() as u64, 2 * plots);
    for file in files {
        let (name, kind) = (file[0].as_str().unwrap(), file[1].as_str().unwrap());
        assert_eq!(kind, if name.ends_with(".png") { "data:image/png;" } else { "data:image/svg+" });
        assert_eq!(file[2], true, "{name} is empty");
    }
}
