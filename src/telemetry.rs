//! What operators see of the traffic.

pub mod metrics;
