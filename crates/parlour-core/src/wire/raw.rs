//! Frames as they are written, without a look at what their fields mean.

use bytes::{Bytes, BytesMut};

use super::decode::{DecodeError, Fields, Value, parts};
use super::encode::{put_varint, write};

/// A frame of any kind, known here or not.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "all that a frame is made of")]
pub struct RawFrame {
    /// The number of its kind.
    pub kind: u8,
    /// Its fields by their numbers, in order.
    pub fields: Vec<(u64, RawValue)>,
    /// Its payload.
    pub payload: Bytes,
}

/// The value of a field.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "the protocol has no others")]
pub enum RawValue {
    /// A varint.
    Number(u64),
    /// A text, or an entry of metadata.
    Bytes(Bytes),
}

impl RawFrame {
    /// Takes the next frame off `message`. Fields of the two types that are not used are left out.
    pub fn decode(message: &mut Bytes) -> Result<Self, DecodeError> {
        let (kind, header, payload) = parts(message)?;
        Ok(Self { kind, fields: fields(&header)?, payload })
    }

    /// Appends the frame to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        write(self.kind, &header(&self.fields), &self.payload, out);
    }

    /// The name and value of an entry of metadata, as fields 1 and 2.
    pub fn entry(name: &str, value: &str) -> RawValue {
        let bytes = |text: &str| RawValue::Bytes(Bytes::copy_from_slice(text.as_bytes()));
        RawValue::Bytes(header(&[(1, bytes(name)), (2, bytes(value))]).freeze())
    }
}

/// The fields that `bytes` are, but for those of the two types that are not used.
pub fn fields(bytes: &Bytes) -> Result<Vec<(u64, RawValue)>, DecodeError> {
    let mut known = Vec::new();
    for field in Fields::new(bytes) {
        let field = field?;
        match field.value {
            Value::Number(value) => known.push((field.number, RawValue::Number(value))),
            Value::Bytes(value) => {
                known.push((field.number, RawValue::Bytes(bytes.slice_ref(value))));
            }
            Value::Skipped => {}
        }
    }
    Ok(known)
}

fn header(fields: &[(u64, RawValue)]) -> BytesMut {
    let mut out = BytesMut::new();
    for (number, value) in fields {
        match value {
            RawValue::Number(value) => {
                put_varint(number << 3, &mut out);
                put_varint(*value, &mut out);
            }
            RawValue::Bytes(bytes) => {
                put_varint(number << 3 | 2, &mut out);
                put_varint(bytes.len() as u64, &mut out);
                out.extend_from_slice(bytes);
            }
        }
    }
    out
}
