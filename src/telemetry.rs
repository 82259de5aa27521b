//! What operators see of the traffic.

pub mod histogram;
pub mod metrics;
