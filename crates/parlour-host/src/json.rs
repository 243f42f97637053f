//! Reading JSON that strangers send, and writing what the hot path answers with.

use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;

use parlour_core::{Fault, FaultKind};
use serde::Deserialize;
use serde::de::{Deserializer, Visitor};
use thiserror::Error;

use crate::config::limits;
use crate::metrics::Metrics;

/// Why bytes are not the JSON that was expected.
#[derive(Debug, Error)]
pub(crate) enum JsonError {
    /// It nests deeper than allowed.
    #[error("JSON nests deeper than {0}")]
    Depth(usize),
    /// It is no text.
    #[error("the JSON is not UTF-8: {0}")]
    Utf8(#[from] std::str::Utf8Error),
    /// It is broken, or of another shape.
    #[error(transparent)]
    Syntax(#[from] serde_json::Error),
}

impl JsonError {
    /// What whoever sent it is told.
    pub(crate) fn fault(&self, metrics: &Metrics) -> Fault {
        let fault = Fault::new(FaultKind::Invalid, self.to_string());
        match self {
            Self::Depth(max) => {
                metrics.limit_met(limits::json_depth, Some(*max), fault.hint("send flatter JSON"))
            }
            Self::Utf8(_) | Self::Syntax(_) => fault.hint("send one JSON text in UTF-8"),
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
    // Checked once as a whole, each text in it need not be.
    Ok(serde_json::from_str(std::str::from_utf8(bytes)?)?)
}

/// A text in JSON: a slice of it, unless something in it was escaped.
///
/// Unlike a bare `Cow`, it is also a slice where it is optional.
#[derive(Debug, Default)]
pub(crate) struct Text<'a>(pub(crate) Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.into())))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}

/// What can stand as a value in an [`object!`].
pub(crate) trait Value {
    /// Appends the value as JSON.
    fn write(&self, out: &mut String);
}

impl Value for str {
    fn write(&self, out: &mut String) {
        // RFC 8259 §7. Looked at without a branch for each byte, which the compiler turns into
        // vector instructions.
        let is_special = |byte: u8| (byte < 0x20) | (byte == b'"') | (byte == b'\\');
        if self.bytes().fold(false, |found, byte| found | is_special(byte)) {
            // Serializing a text cannot fail.
            out.push_str(&serde_json::to_string(self).unwrap_or_default());
        } else {
            out.reserve(self.len() + 2);
            out.push('"');
            out.push_str(self);
            out.push('"');
        }
    }
}

impl<T: Value + ?Sized> Value for &T {
    fn write(&self, out: &mut String) {
        (**self).write(out);
    }
}

impl<T: Value> Value for Option<T> {
    fn write(&self, out: &mut String) {
        match self {
            Some(value) => value.write(out),
            None => out.push_str("null"),
        }
    }
}

/// Appends a JSON object to a `String`. Its keys are texts that need no escapes.
macro_rules! object {
    ($out:expr, { $first:literal: $first_value:expr $(, $key:literal: $value:expr)* $(,)? }) => {{
        let out: &mut String = $out;
        out.push_str(concat!("{\"", $first, "\":"));
        $crate::json::Value::write($first_value, out);
        $(
            out.push_str(concat!(",\"", $key, "\":"));
            $crate::json::Value::write($value, out);
        )*
        out.push('}');
    }};
}
pub(crate) use object;

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
    fn texts_are_slices_unless_they_were_escaped() {
        let texts: Vec<Option<Text<'_>>> =
            parse("[\"plain é\", \"\\u0041\", null]".as_bytes(), 1).unwrap();
        let texts: Vec<_> = texts.into_iter().map(|text| text.map(|text| text.0)).collect();
        assert!(matches!(texts[0], Some(Cow::Borrowed("plain é"))));
        assert!(matches!(&texts[1], Some(Cow::Owned(text)) if text == "A"));
        assert!(texts[2].is_none());
        assert!(matches!(parse::<Text<'_>>(b"\"\xff\"", 1), Err(JsonError::Utf8(_))));
    }

    #[test]
    fn an_object_is_written_as_serde_would() {
        for text in ["", "plain", "é\u{2028}", "quote \" slash \\ line \n nul \0 del \x7f"] {
            let mut out = String::new();
            object!(&mut out, { "a": text, "b": &Some(text), "c": &None::<&str> });
            assert_eq!(out, serde_json::json!({"a": text, "b": text, "c": null}).to_string());
        }
    }

    #[test]
    fn depth_is_counted_outside_of_strings_only() {
        assert!(check_depth(br#"[{"a":"[[[[\"[["}]"#, 2).is_ok());
        assert!(check_depth(br#"[{"a":[]}]"#, 2).is_err());
        assert!(check_depth(&[b'['; 100_000], 64).is_err());
    }
}
