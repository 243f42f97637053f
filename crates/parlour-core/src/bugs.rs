//! Mistakes put in on purpose, to show that the tests find them.
//!
//! Nothing of this is in a build without the feature `bugs`, which only tests ask for. There a mistake
//! is made by the threads on which it was planted, or by the whole process whose environment names it in
//! `PARLOUR_BUG`.

use std::cell::Cell;
use std::sync::OnceLock;

thread_local! {
    static PLANTED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// From now on this thread makes the mistake of this name, or none.
pub fn plant(name: Option<&'static str>) {
    PLANTED.set(name);
}

/// Whether this thread, or this process, makes the mistake of this name.
pub fn is_planted(name: &str) -> bool {
    static OF_PROCESS: OnceLock<Option<String>> = OnceLock::new();
    let of_process = OF_PROCESS.get_or_init(|| std::env::var("PARLOUR_BUG").ok());
    PLANTED.get() == Some(name) || of_process.as_deref() == Some(name)
}
