//! Mistakes put in on purpose, to show that the simulation finds them.
//!
//! Nothing of this is in a build without the feature `bugs`, which only tests ask for; there a
//! mistake is made by the threads on which it was planted.

use std::cell::Cell;

thread_local! {
    static PLANTED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// From now on this thread makes the mistake of this name, or none.
pub fn plant(name: Option<&'static str>) {
    PLANTED.set(name);
}

/// Whether this thread makes the mistake of this name.
pub fn is_planted(name: &str) -> bool {
    PLANTED.get() == Some(name)
}
