//! How a test gets the double: it runs in a process of its own, in which the double is found in place of `libcuda.so`. Where
//! `STEPMESH_REAL_CUDA` is set, those that need nothing of the double's own run on the machine's GPU instead.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "for tests")]

use cudarc::driver::sys::{self, CUresult};
use std::ffi::CString;
use std::path::PathBuf;
use std::process::Command;

/// Set in the process that has the double.
const INSIDE: &str = "STEPMESH_FAKE_CUDA";

/// Whether tests run on the machine's own driver.
fn is_real() -> bool {
    std::env::var_os("STEPMESH_REAL_CUDA").is_some()
}

/// A double as it was built beside this test.
fn library(name: &str) -> PathBuf {
    let beside = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let built = std::fs::read_dir(&beside).unwrap().flatten().map(|entry| entry.path()).filter(|path| {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        file.starts_with(name) && file.ends_with(".so")
    });
    built.max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok()).expect("the double was not built")
}

/// A command that runs test `name` of this program in a process that finds the double, or no driver at all.
pub fn process(name: &str, has_driver: bool) -> (Command, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    if has_driver && !is_real() {
        std::os::unix::fs::symlink(library("libstepmesh_fake_cuda"), directory.path().join("libcuda.so")).unwrap();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
    if !is_real() {
        command.env("LD_LIBRARY_PATH", directory.path());
    }
    (command, directory)
}

/// Has a command's processes find a GPU that computes: the double of `stepmesh-fake-gpu`, which the caller's package depends on; or
/// the machine's own. None where there is no C++ compiler to make its kernels of.
pub fn give_gpu(command: &mut Command) -> Option<tempfile::TempDir> {
    let directory = tempfile::tempdir().unwrap();
    if is_real() {
        return Some(directory);
    }
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    if Command::new(&compiler).arg("--version").output().is_err() {
        eprintln!("not run: there is no {}", compiler.to_string_lossy());
        return None;
    }
    let library = library("libstepmesh_fake_gpu");
    std::os::unix::fs::symlink(&library, directory.path().join("libcuda.so")).unwrap();
    command.env("LD_LIBRARY_PATH", directory.path()).env("STEPMESH_NVRTC", library);
    Some(directory)
}

/// Runs `test`, which is the whole of test `name`, in a process of its own on a GPU that computes.
pub fn with_gpu(name: &str, test: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return test();
    }
    run_on_a_gpu(&["--exact", name]);
}

/// Runs some tests of this program on a GPU that computes.
pub fn run_on_a_gpu(tests: &[&str]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(tests).args(["--nocapture", "--test-threads", "1"]).env(INSIDE, "1").env("STEPMESH_TEST_GPU", "0");
    let Some(_directory) = give_gpu(&mut command) else { return };
    let said = succeed(command);
    assert!(said.contains(" passed") && !said.contains(" 0 passed"), "{said}");
}

/// Runs a command, which must succeed; what it says.
fn succeed(mut command: Command) -> String {
    let output = command.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    said
}

/// Runs `test`, which is the whole of test `name`, in a process of its own with the double, which it tells what to do.
pub fn with_double(name: &str, test: impl FnOnce()) {
    if !is_real() {
        within(name, true, test);
    }
}

/// As [`with_double`], for what holds on every driver.
pub fn with_driver(name: &str, test: impl FnOnce()) {
    within(name, true, test);
}

/// As [`with_double`], where there is no driver.
pub fn without_driver(name: &str, test: impl FnOnce()) {
    if !is_real() {
        within(name, false, test);
    }
}

fn within(name: &str, has_driver: bool, test: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return test();
    }
    let (command, _directory) = process(name, has_driver);
    let said = succeed(command);
    assert!(said.contains("1 passed"), "{said}");
}

/// The double's own entry points.
fn control<T: Copy>(name: &[u8]) -> T {
    // SAFETY: the double is loaded in place of the driver; the type is the caller's to know.
    unsafe { *sys::culib().get::<T>(name).unwrap() }
}

/// From now on that entry point fails so often.
pub fn fail(name: &str, error: CUresult, times: u32) {
    let name = CString::new(name).unwrap();
    let call: unsafe extern "C" fn(*const std::ffi::c_char, CUresult, u32) = control(b"fakeFail\0");
    // SAFETY: the double's contract.
    unsafe { call(name.as_ptr(), error, times) };
}

/// From now on the device says this of itself.
pub fn attribute(attribute: sys::CUdevice_attribute, value: i32) {
    let call: extern "C" fn(i32, i32) = control(b"fakeAttribute\0");
    call(attribute as i32, value);
}

/// From now on the driver is of this version.
pub fn version(version: i32) {
    let call: extern "C" fn(i32) = control(b"fakeVersion\0");
    call(version);
}

/// Bytes of device memory that are allocated; a real driver does not say.
pub fn allocated() -> usize {
    if is_real() {
        return 0;
    }
    let call: extern "C" fn() -> usize = control(b"fakeAllocated\0");
    call()
}
