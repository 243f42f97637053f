//! Numbers as decimal digits of a fixed width, so that they can be written over each other.

/// As many digits as the number of a call has.
pub(super) const DIGITS: usize = 12;

/// Fills `place` with the last digits of `number`.
pub(super) fn put(mut number: u64, place: &mut [u8]) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

pub(super) fn read(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read() {
        for number in [0, 7, 123_456_789_012] {
            let mut place = [0; DIGITS];
            put(number, &mut place);
            assert_eq!(read(&place), Some(number));
        }
        assert_eq!(read(b"12x"), None);
    }
}
