//! What comes in by pointer: looked at once, copied, refused by name.

use crate::status::Failure;
use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

/// The value behind a pointer.
///
/// # Safety
/// The crate's contract.
pub(crate) unsafe fn read<'a, T>(pointer: *const T, name: &str) -> Result<&'a T, Failure> {
    // SAFETY: null or valid by the crate's contract.
    unsafe { pointer.as_ref() }.ok_or_else(|| Failure::invalid(format!("{name} is null")))
}

/// The place for a result, checked before anything is done.
///
/// # Safety
/// The crate's contract.
pub(crate) unsafe fn out<'a, T>(pointer: *mut T, name: &str) -> Result<&'a mut MaybeUninit<T>, Failure> {
    // SAFETY: null or valid for writing by the crate's contract; `MaybeUninit` asks nothing of the bytes.
    unsafe { pointer.cast::<MaybeUninit<T>>().as_mut() }.ok_or_else(|| Failure::invalid(format!("{name} is null")))
}

/// At most `most` values.
///
/// # Safety
/// The crate's contract.
pub(crate) unsafe fn slice<'a, T>(
    pointer: *const T,
    count: usize,
    most: usize,
    name: &str,
) -> Result<&'a [T], Failure> {
    if count > most {
        return Err(Failure::invalid(format!("{count} {name}: at most {most}")));
    }
    if count == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(Failure::invalid(format!("{name} is null, with a count of {count}")));
    }
    // SAFETY: not null, so valid for `count` values by the crate's contract.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// A text; none if null.
///
/// # Safety
/// The crate's contract.
pub(crate) unsafe fn text(pointer: *const c_char, name: &str) -> Result<Option<String>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: not null, so terminated by the crate's contract.
    let text = unsafe { CStr::from_ptr(pointer) }.to_str();
    text.map(|text| Some(text.to_owned())).map_err(|_| Failure::invalid(format!("{name} is not UTF-8")))
}
