//! The integration tests: a real proxy between real sockets, linked once.
//!
//! They wait for facts (a revision, a count, a byte), never for time, and every listener has port
//! 0.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod abuse;
mod access_log;
mod admin;
mod attempts;
mod bad_luck;
mod balance;
mod cli;
mod descriptors;
mod discovery;
mod errors;
mod fault;
mod filters;
mod forwarding;
mod fuzz;
mod grpc;
mod headers;
mod history;
mod http2;
mod http2_frames;
mod limits;
mod moves;
mod paths;
mod proxy_protocol;
mod reload;
mod resilience;
mod shutdown;
mod smuggling;
mod split;
mod support;
mod takeover;
mod tls;
mod tracing;
mod transcode;
mod tunnels;
mod upstream_http2;
mod upstream_tls;
mod weights;
