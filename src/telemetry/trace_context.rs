//! Which trace a request belongs to: the `traceparent` field of W3C Trace Context (level 2,
//! section 3.2).

use http::header::{HeaderMap, HeaderName, HeaderValue};

/// The field.
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// `00-<trace-id>-<parent-id>-<flags>`, in bytes; later versions may say more behind it.
const LENGTH: usize = 55;

/// What a caller says of the trace that its request belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; never zero.
    pub trace_id: u128,
    /// The caller's span; never zero.
    pub parent_id: u64,
    /// Flags; of those the lowest says that the caller may have recorded it.
    pub flags: u8,
}

// === impl TraceContext ===

impl TraceContext {
    /// The trace of a request with these fields. One that names two belongs to none.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let value = values.next()?;
        match values.next() {
            None => Self::parse(value.as_bytes()),
            Some(_) => None,
        }
    }

    /// Reads the value of the field, in any version.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let (head, rest) = value.split_at_checked(LENGTH)?;
        let mut parts = head.split(|byte| *byte == b'-');
        let mut part = |digits| parts.next().filter(|part| part.len() == digits);
        let (version, trace_id, parent_id, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        let is_known = match hex(version)? {
            0 => rest.is_empty(),
            0xff => false,
            _ => matches!(rest, [] | [b'-', ..]),
        };
        let context = Self {
            trace_id: hex(trace_id)?,
            parent_id: u64::try_from(hex(parent_id)?).ok()?,
            flags: u8::try_from(hex(flags)?).ok()?,
        };
        (is_known && context.trace_id != 0 && context.parent_id != 0).then_some(context)
    }

    /// As a value of the field, in version 00. Written digit by digit, since each request has one.
    pub fn value(&self) -> HeaderValue {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        write_hex(&mut text[3..35], self.trace_id);
        write_hex(&mut text[36..52], self.parent_id.into());
        write_hex(&mut text[53..], self.flags.into());
        HeaderValue::from_bytes(&text).expect("digits and dashes")
    }
}

fn write_hex(digits: &mut [u8], mut value: u128) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(value & 0xf) as usize];
        value >>= 4;
    }
}

/// Up to 32 digits, which have to be small ones.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn of(values: &[&'static str]) -> Option<TraceContext> {
        let fields = values
            .iter()
            .map(|value| (TRACEPARENT, HeaderValue::from_static(value)));
        TraceContext::of(&fields.collect())
    }

    #[test]
    fn a_sound_field_is_read() {
        let context = of(&[VALUE]).unwrap();
        assert_eq!(context.trace_id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!(context.parent_id, 0x00f0_67aa_0ba9_02b7);
        assert_eq!(context.flags, 1);
        assert_eq!(context.value(), VALUE);
    }

    #[test]
    fn a_later_version_may_say_more() {
        for value in [
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03-and-more",
        ] {
            assert_eq!(of(&[value]).unwrap().flags, 3, "{value}");
        }
    }

    #[test]
    fn what_is_not_one_trace_is_none() {
        for value in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "00 4bf92f3577b34da6a3ce929d0e0e4736 00f067aa0ba902b7 01",
        ] {
            assert_eq!(of(&[value]), None, "{value}");
        }
        assert_eq!(of(&[VALUE, VALUE]), None);
        assert_eq!(of(&[]), None);
    }
}
