//! Reading JSON that strangers send.

use parlour_core::{Fault, FaultKind};
use serde::Deserialize;
use thiserror::Error;

use crate::config::limits;

/// Why bytes are not the JSON that was expected.
#[derive(Debug, Error)]
pub(crate) enum JsonError {
    /// It nests deeper than allowed.
    #[error("JSON nests deeper than {0}")]
    Depth(usize),
    /// It is broken, or of another shape.
    #[error(transparent)]
    Syntax(#[from] serde_json::Error),
}

impl From<JsonError> for Fault {
    fn from(error: JsonError) -> Self {
        let fault = Self::new(FaultKind::Invalid, error.to_string());
        match error {
            JsonError::Depth(max) => {
                fault.hint("send flatter JSON").limit(limits::json_depth, Some(max as u64))
            }
            JsonError::Syntax(_) => fault.hint("send one JSON text in UTF-8"),
        }
    }
}

/// Parses `bytes`, of which texts in the result may be slices.
///
/// A key that a struct knows may stand in it only once.
pub(crate) fn parse<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
    max_depth: usize,
) -> Result<T, JsonError> {
    check_depth(bytes, max_depth)?;
    Ok(serde_json::from_slice(bytes)?)
}

/// Refuses what nests deeper than `max`, before any parser recurses into it.
fn check_depth(bytes: &[u8], max: usize) -> Result<(), JsonError> {
    // Most bodies open fewer brackets than may nest, and counting them is quick.
    if memchr::memchr2_iter(b'[', b'{', bytes).count() <= max {
        return Ok(());
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for &byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > max {
                    return Err(JsonError::Depth(max));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_counted_outside_of_strings_only() {
        assert!(check_depth(br#"[{"a":"[[[[\"[["}]"#, 2).is_ok());
        assert!(check_depth(br#"[{"a":[]}]"#, 2).is_err());
        assert!(check_depth(&[b'['; 100_000], 64).is_err());
    }
}
