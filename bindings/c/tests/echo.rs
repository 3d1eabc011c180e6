//! A C program on both sides: compiled with the system's compiler, joined through a scheduler, over shared memory.
#![allow(clippy::unwrap_used, reason = "a test's own functions")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use stepmesh_mesh::scheduler::{SchedulerOptions, ServeOptions, spawn};

/// Where the libraries of this build lie: beside this test.
fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

fn compile(into: &Path) -> PathBuf {
    let crate_directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = into.join("echo");
    let libraries = libraries();
    let compiled = Command::new("cc")
        .args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", "-o"])
        .arg(&program)
        .arg(crate_directory.join("examples/echo.c"))
        .arg("-I")
        .arg(crate_directory.join("include"))
        .arg("-L")
        .arg(&libraries)
        .arg(format!("-Wl,-rpath,{}", libraries.display()))
        .arg("-lstepmesh_c")
        .status()
        .unwrap();
    assert!(compiled.success(), "echo.c does not compile");
    program
}

#[test]
fn a_c_program_answers_another() {
    let directory = tempfile::tempdir().unwrap();
    let program = compile(directory.path());
    let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(1, 1))).unwrap();
    let start = |side: &str| {
        let mut command = Command::new(&program);
        command.args([side, &scheduler.url(), "100"]).stdout(Stdio::piped()).spawn().unwrap()
    };
    let sides = [start("ffn"), start("attention")];
    let [ffn, attention] = sides.map(|side| side.wait_with_output().unwrap());
    assert!(attention.status.success() && ffn.status.success());
    assert_eq!(String::from_utf8_lossy(&attention.stdout), "100 round trips, all right\n");
    assert_eq!(String::from_utf8_lossy(&ffn.stdout), "100 of 100 batches answered\n");
}
