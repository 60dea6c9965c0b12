//! The panic boundary: a bug of ours inside QEMU's process ends capture, never the process or a request.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work`; a panic in it becomes its message.
///
/// Must not be used around anything that switches coroutines: unwinding would cross to another stack.
pub(crate) fn guard<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    // Unwind safety: after a panic the capture is off for good and its state is only released, not read.
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| message(payload.as_ref()))
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(guard(|| 7), Ok(7));
        assert_eq!(guard(|| -> u8 { panic!("number {}", 5) }), Err("number 5".to_owned()));
    }
}
