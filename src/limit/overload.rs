//! How many requests are served at a time, in the whole process.
//!
//! Too many at once make all of them slow, and memory run out; so those beyond a limit are told at once
//! to come again. Whose requests must not be among them says so: for them there is a reserve beyond the
//! limit.

/// How many requests may be in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overload {
    /// How many of normal priority; `None` for any number.
    pub in_flight: Option<u32>,
}

/// How important the requests of a route are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// As most are.
    #[default]
    Normal,
    /// They are served even beyond the limit: health checks of a load balancer in front, for one.
    Critical,
}

/// The reserve for critical requests is this part of the limit, and at least 1.
pub const RESERVE: u32 = 10;

// === impl Overload ===

impl Overload {
    /// Whether the request that makes so many in flight, itself among them, is served.
    pub fn admits(self, in_flight: i64, priority: Priority) -> bool {
        let Some(limit) = self.in_flight else {
            return true;
        };
        let reserve = match priority {
            Priority::Normal => 0,
            Priority::Critical => limit.div_ceil(RESERVE),
        };
        in_flight <= i64::from(limit) + i64::from(reserve)
    }
}

// === impl Priority ===

impl Priority {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Normal, Self::Critical];

    /// The word for it in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Critical => "critical",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_limit_only_critical_requests_are_served_and_not_without_end() {
        let overload = Overload {
            in_flight: Some(100),
        };
        for (in_flight, normal, critical) in [
            (1, true, true),
            (100, true, true),
            (101, false, true),
            (110, false, true),
            (111, false, false),
        ] {
            assert_eq!(overload.admits(in_flight, Priority::Normal), normal);
            assert_eq!(overload.admits(in_flight, Priority::Critical), critical);
        }
        let smallest = Overload { in_flight: Some(1) };
        assert!(smallest.admits(2, Priority::Critical));
        assert!(Overload { in_flight: None }.admits(i64::MAX, Priority::Normal));
    }
}
