//! NVRTC's calls, with a C++ compiler behind them. What it makes is kept beside this library, by what it was made of.

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What stands for CUDA's own words.
const DEVICE: &str = include_str!("device.h");
/// NVRTC's statuses.
const SUCCESS: c_int = 0;
const INVALID_INPUT: c_int = 3;
const COMPILATION: c_int = 6;

#[derive(Default)]
struct Program {
    source: String,
    log: Vec<u8>,
    /// The path of the library, and a zero.
    image: Vec<u8>,
}

/// A kernel as its source declares it.
struct Kernel<'a> {
    name: &'a str,
    /// Types of its arguments.
    arguments: Vec<&'a str>,
}

impl<'a> Kernel<'a> {
    /// The one that a line declares: `extern "C" __global__ void [attributes] name(type name, …) {`.
    fn of(line: &'a str) -> Option<Self> {
        let line = line.strip_prefix("extern \"C\" __global__ void ")?;
        let line = match line.strip_prefix("__launch_bounds__") {
            Some(rest) => rest.split_once(") ")?.1,
            None => line,
        };
        let (name, rest) = line.split_once('(')?;
        let (arguments, _) = rest.split_once(") {")?;
        let types = arguments.split(", ").filter_map(|argument| {
            let name = argument.rfind(|c: char| !c.is_alphanumeric() && c != '_')?;
            Some(argument[..=name].trim())
        });
        Some(Self { name, arguments: types.collect() })
    }
}

/// The source as C++, with a way in for each kernel.
fn translate(source: &str, options: &[String]) -> String {
    let mut text = String::new();
    for (name, value) in options.iter().filter_map(|option| option.strip_prefix("-D")?.split_once('=')) {
        let _ = writeln!(text, "#define {name} {value}");
    }
    text.push_str(DEVICE);
    for line in source.lines() {
        // What a kernel shares and a launch gives room for.
        let shared = line.trim().strip_prefix("extern __shared__ ").and_then(|rest| rest.strip_suffix("[];"));
        match shared.and_then(|rest| rest.trim_start_matches("__align__(1024) ").rsplit_once(' ')) {
            Some((kind, name)) => {
                let _ = writeln!(text, "{kind} *{name} = ({kind} *)device::shared;");
            }
            None => {
                let _ = writeln!(text, "{line}");
            }
        }
    }
    // Only those that the options leave in: the others' names are not declared.
    let mut rounds = "1";
    for line in source.lines() {
        match line {
            "#if ROUNDS" => rounds = "ROUNDS",
            "#if !ROUNDS" => rounds = "!ROUNDS",
            "#else" if rounds == "!ROUNDS" => rounds = "ROUNDS",
            "#else" if rounds == "ROUNDS" => rounds = "!ROUNDS",
            "#endif" => rounds = "1",
            _ => {}
        }
        if let Some(Kernel { name, arguments }) = Kernel::of(line) {
            let sizes = arguments.iter().map(|kind| format!("sizeof({kind})")).collect::<Vec<_>>().join(", ");
            let given = arguments.iter().enumerate().map(|(index, kind)| format!("*({kind} *)arguments[{index}]"));
            let given = given.collect::<Vec<_>>().join(", ");
            let _ = writeln!(
                text,
                "#if {rounds}\nextern \"C\" size_t sizes_{name}(size_t *to) {{ for (size_t size : {{{sizes}}}) *to++ = size; return {}; }}\n\
                 extern \"C\" void run_{name}(const unsigned *grid, unsigned threads, unsigned shared, void *const *arguments) {{\n\
                 device::run(grid, threads, shared, [=] {{ {name}({given}); }});\n}}\n#endif",
                arguments.len()
            );
        }
    }
    text
}

/// The directory of this library.
fn directory() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mine = (directory as *const ()).addr();
    let around = |line: &&str| {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let number = |text: &str| usize::from_str_radix(text, 16).unwrap_or_default();
        range.is_some_and(|(start, end)| (number(start)..number(end)).contains(&mine))
    };
    let path = maps.lines().find(around).and_then(|line| Some(PathBuf::from(&line[line.find('/')?..])));
    path.as_deref().and_then(Path::parent).map_or_else(std::env::temp_dir, Path::to_owned)
}

fn compile(source: &str, options: &[String]) -> Result<Vec<u8>, Vec<u8>> {
    let text = translate(source, options);
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    // It is for the processor at hand.
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    processor.lines().find(|line| line.starts_with("flags")).hash(&mut hasher);
    let path = directory().join(format!("fake-gpu-{:016x}.so", hasher.finish()));
    let said = |error: std::io::Error| error.to_string().into_bytes();
    if !path.exists() {
        let own = path.with_extension(format!("{}.so", std::process::id()));
        let code = own.with_extension("cpp");
        std::fs::write(&code, text).map_err(said)?;
        let output = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "g++".into()))
            .args(["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-o"])
            .args([&own, &code])
            .output()
            .map_err(|error| format!("no C++ compiler: {error}").into_bytes())?;
        let _ = std::fs::remove_file(&code);
        if !output.status.success() {
            return Err(output.stderr);
        }
        std::fs::rename(&own, &path).map_err(said)?;
    }
    Ok([path.as_os_str().as_bytes(), b"\0"].concat())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCreateProgram(
    out: *mut *mut c_void,
    source: *const c_char,
    _name: *const c_char,
    _headers: c_int,
    _contents: *const *const c_char,
    _names: *const *const c_char,
) -> c_int {
    // SAFETY: NVRTC's contract, here and below: strings, and pointers that may be written.
    let source = unsafe { CStr::from_ptr(source) }.to_string_lossy().into_owned();
    // SAFETY: as above.
    unsafe { out.write(Box::into_raw(Box::new(Program { source, ..Program::default() })).cast()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCompileProgram(program: *mut c_void, count: c_int, options: *const *const c_char) -> c_int {
    // SAFETY: it came from `nvrtcCreateProgram`.
    let program = unsafe { &mut *program.cast::<Program>() };
    let Ok(count) = usize::try_from(count) else { return INVALID_INPUT };
    // SAFETY: as above.
    let option = |index| unsafe { CStr::from_ptr(*options.add(index)) }.to_string_lossy().into_owned();
    match compile(&program.source, &(0..count).map(option).collect::<Vec<_>>()) {
        Ok(image) => {
            program.image = image;
            SUCCESS
        }
        Err(log) => {
            program.log = log;
            COMPILATION
        }
    }
}

/// How long a text or an image is, and where it goes.
unsafe fn give(bytes: &[u8], size: *mut usize, to: *mut c_char) -> c_int {
    // SAFETY: the caller's pointers: null, or with room for what the size said.
    unsafe {
        if !size.is_null() {
            size.write(bytes.len());
        }
        if !to.is_null() {
            std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), to, bytes.len());
        }
    }
    SUCCESS
}

/// # Safety
/// It came from `nvrtcCreateProgram`.
unsafe fn of<'a>(program: *mut c_void) -> &'a Program {
    // SAFETY: the caller's promise.
    unsafe { &*program.cast::<Program>() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLogSize(program: *mut c_void, size: *mut usize) -> c_int {
    // SAFETY: NVRTC's contract.
    unsafe { give(&of(program).log, size, std::ptr::null_mut()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLog(program: *mut c_void, to: *mut c_char) -> c_int {
    // SAFETY: as above.
    unsafe { give(&of(program).log, std::ptr::null_mut(), to) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut c_void, size: *mut usize) -> c_int {
    // SAFETY: as above.
    unsafe { give(&of(program).image, size, std::ptr::null_mut()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBIN(program: *mut c_void, to: *mut c_char) -> c_int {
    // SAFETY: as above.
    unsafe { give(&of(program).image, std::ptr::null_mut(), to) }
}
