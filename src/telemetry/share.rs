//! A part of all requests, drawn by lot.

/// A part of the whole, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share(f64);

// === impl Share ===

impl Share {
    /// None of them.
    pub const NONE: Self = Self(0.0);
    /// All of them.
    pub const ALL: Self = Self(1.0);

    /// `None` for what is no part of a whole.
    pub fn new(part: f64) -> Option<Self> {
        (0.0..=1.0).contains(&part).then_some(Self(part))
    }

    /// True for this part of all dice, each from 0 up to but not including 1.
    pub fn takes(self, die: f64) -> bool {
        die < self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_larger_share_takes_whatever_a_smaller_one_does(
            a in 0.0..=1.0f64,
            b in 0.0..=1.0f64,
            die in 0.0..1.0f64,
        ) {
            let (less, more) = (Share::new(a.min(b)).unwrap(), Share::new(a.max(b)).unwrap());
            prop_assert!(!less.takes(die) || more.takes(die));
            prop_assert!(Share::ALL.takes(die) && !Share::NONE.takes(die));
        }
    }

    #[test]
    fn what_is_no_part_of_a_whole_is_no_share() {
        for part in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert_eq!(Share::new(part), None, "{part}");
        }
    }
}
