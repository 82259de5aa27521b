//! Serin, a traffic proxy for canary and gray releases.
//!
//! It stands in front of a service, splits requests between versions of it, and shows how each
//! version does. One routing file says who gets which version; it is reloaded while requests run.
//!
//! The modules in the order in which a reader may want them:
//!
//! * [`proxy`]: one request's way, on one screen;
//! * [`routing`]: which route, which backend, and why; pure;
//! * [`filter`]: redirects, rewrites and CORS, as the Gateway API has them; pure;
//! * [`backend`], [`upstream`], [`stream`], [`tls`], [`proxy_protocol`]: the pool of one version, and the connections to it;
//! * [`discovery`]: endpoints that move, by names and by files;
//! * [`health`]: takes endpoints out that are not well;
//! * [`config`]: from the file's text to a configuration that cannot be wrong;
//! * [`snapshot`], [`control`]: what requests are served by, and the only place that replaces it;
//! * [`weights`]: those that are set at run time, and how they stand to those of the file;
//! * [`server`], [`admin`]: where clients and operators come in; [`access`]: who of them may change something;
//! * [`telemetry`], [`explain`]: what operators see;
//! * [`app`]: where all of it is put together; [`cli`], [`demo`]: what runs it; [`healthcheck`]: what asks it;
//! * [`takeover`], [`systemd`], [`descriptors`]: the process among others.
//!
//! `ARCHITECTURE.md` has the map, the invariants and the lexicon.

pub mod access;
pub mod admin;
pub mod app;
pub mod backend;
pub mod cli;
pub mod config;
pub mod control;
pub mod demo;
pub mod descriptors;
pub mod discovery;
pub mod explain;
pub mod filter;
pub mod health;
pub mod healthcheck;
pub mod history;
pub mod import;
pub mod limit;
pub mod proxy;
pub mod proxy_protocol;
pub mod routing;
pub mod server;
pub mod snapshot;
pub mod stream;
pub mod systemd;
pub mod takeover;
pub mod telemetry;
pub mod tls;
pub mod transcode;
pub mod upstream;
pub mod url;
mod weak_list;
pub mod weights;
pub mod whole_file;
