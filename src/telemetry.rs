//! What operators see of the traffic.

pub mod access_log;
pub mod histogram;
pub mod metrics;
pub mod process_log;
pub mod share;
pub mod trace;
pub mod trace_context;
