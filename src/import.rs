//! Configurations of others, as ones of Serin's.
//!
//! What is written is a configuration that can be used as it stands, or says what has to be mended first; and
//! everything that it leaves out of what was read is told: whoever migrates must not find out by a request.

mod ingress;
pub mod ingress_nginx;
mod yaml;

/// A configuration that was translated.
#[derive(Debug, PartialEq, Eq)]
pub struct Imported {
    /// The text of the configuration file.
    pub config: String,
    /// What it does not say, or says otherwise, each in a sentence.
    pub notes: Vec<String>,
    /// What has to be mended before it can be used: the problems that `serin check` has with it.
    pub mending: Vec<String>,
}
