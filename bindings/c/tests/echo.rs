//! A C program on both sides: compiled with the system's compiler, joined through a scheduler, over shared memory. With the
//! shared library and the static one, as they are installed, and under the sanitizers.
#![allow(clippy::unwrap_used, reason = "a test's own functions")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use stepmesh_mesh::scheduler::{SchedulerOptions, ServeOptions, spawn};

/// Installs the libraries of this build, which lie beside this test.
fn install(into: &Path) -> PathBuf {
    let libraries = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let prefix = into.join("prefix");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("install");
    let installed = Command::new(script).arg(&prefix).env("LIBRARIES", libraries).status().unwrap();
    assert!(installed.success());
    prefix
}

/// What the installed stepmesh.pc says: by pkg-config where there is one, else read here.
fn flags(prefix: &Path, asked: &str) -> Vec<String> {
    let directory = prefix.join("lib/pkgconfig");
    let mut pkg_config = Command::new("pkg-config");
    pkg_config.env("PKG_CONFIG_PATH", &directory).args(asked.split(' ')).arg("stepmesh");
    let said = match pkg_config.output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        }
        Err(_) => {
            let file = std::fs::read_to_string(directory.join("stepmesh.pc")).unwrap();
            let field = |name: &str| file.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").to_owned();
            let mut said = if asked.contains("--cflags") { field("Cflags:") } else { field("Libs:") };
            if asked.contains("--static") {
                said += &field("Libs.private:");
            }
            let prefix = prefix.display().to_string();
            said.replace("${libdir}", &format!("{prefix}/lib")).replace("${includedir}", &format!("{prefix}/include"))
        }
    };
    said.split_whitespace().map(str::to_owned).collect()
}

fn compile(into: &Path, prefix: &Path, name: &str, library: &[String], more: &[&str]) -> PathBuf {
    let program = into.join(name);
    let compiled = Command::new("cc")
        .args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pedantic", "-o"])
        .arg(&program)
        .args(more)
        .args(flags(prefix, "--cflags"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/echo.c"))
        .args(library)
        .status()
        .unwrap();
    assert!(compiled.success(), "echo.c does not compile");
    program
}

/// 100 round trips between two processes of the program.
fn echo(program: &Path) {
    let scheduler = spawn(ServeOptions::new(SchedulerOptions::new(1, 1))).unwrap();
    let start = |side: &str| {
        let mut command = Command::new(program);
        // Else it is an older build's library that is found.
        command.env_remove("LD_LIBRARY_PATH");
        command.args([side, &scheduler.url(), "100"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let sides = [start("ffn"), start("attention")];
    for (side, printed) in sides.into_iter().zip(["100 of 100 batches answered\n", "100 round trips, all right\n"]) {
        let ended = side.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && said.is_empty(), "{said}");
        assert_eq!(String::from_utf8_lossy(&ended.stdout), printed);
    }
}

fn shared(prefix: &Path) -> Vec<String> {
    let mut library = flags(prefix, "--libs");
    library.push(format!("-Wl,-rpath,{}", prefix.join("lib").display()));
    library
}

#[test]
fn a_c_program_answers_another() {
    let directory = tempfile::tempdir().unwrap();
    let prefix = install(directory.path());
    echo(&compile(directory.path(), &prefix, "echo", &shared(&prefix), &[]));
}

#[test]
fn a_c_program_needs_no_shared_library() {
    let directory = tempfile::tempdir().unwrap();
    let prefix = install(directory.path());
    // The linker takes the shared library where both are.
    std::fs::remove_file(prefix.join("lib/libstepmesh_c.so")).unwrap();
    echo(&compile(directory.path(), &prefix, "echo", &flags(&prefix, "--static --libs"), &[]));
}

#[test]
fn a_c_program_is_clean_under_the_sanitizers() {
    let directory = tempfile::tempdir().unwrap();
    let prefix = install(directory.path());
    let sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    echo(&compile(directory.path(), &prefix, "echo", &shared(&prefix), &sanitizers));
}
