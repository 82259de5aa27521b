//! The command line: its words and their types.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::history::rollback::Which;
use crate::url::Url;

/// A traffic proxy for canary and gray releases.
#[derive(Debug, Parser)]
#[command(name = "serin", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to log: error, warn, info, debug, or a filter such as `info,serin::proxy=debug` (default:
    /// info, and warn for the demo). Builds for production have no level trace.
    #[arg(long, env = "SERIN_LOG", global = true, value_name = "FILTER")]
    pub log: Option<String>,

    /// How to log.
    #[arg(long, env = "SERIN_LOG_FORMAT", default_value = "text", global = true)]
    pub log_format: LogFormat,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the proxy.
    Run(Run),
    /// Check a configuration file and print every problem. Exits 0 when it can be used, 1 when not,
    /// 2 when it cannot be read.
    Check(Check),
    /// Print what would become of a request, and why.
    Explain(Explain),
    /// Print the JSON Schema of the configuration file.
    Schema,
    /// Translate the configuration of another proxy into one of Serin's.
    #[command(subcommand)]
    Import(Import),
    /// List the revisions of the configuration file that were in force, the latest first, and what each has
    /// changed. A star marks what the file says now.
    History(History),
    /// Make the configuration file say again what it said before. A proxy that serves with it follows, as it
    /// follows an editor. Exits 1, and changes nothing, when the revision cannot be used any more.
    Rollback(Rollback),
    /// Ask a running proxy whether it is ready. Exits 0 when it is, and 1 when not.
    Healthcheck(Healthcheck),
    /// Run everything on this machine: two versions of a service, the proxy, some clients, and a
    /// table that compares.
    Demo(Demo),
}

/// Run the proxy.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// The configuration file.
    #[arg(long, short, env = "SERIN_CONFIG", value_name = "FILE")]
    pub config: PathBuf,

    /// Take over from the process that listens at this Unix socket, if there is one: it gives its
    /// listening sockets, and leaves when this process is ready. Then this one listens there for its
    /// own successor.
    #[arg(long, env = "SERIN_TAKEOVER", value_name = "PATH")]
    pub takeover: Option<PathBuf>,
}

/// Check a configuration file.
#[derive(Debug, Args)]
pub struct Check {
    /// The configuration file.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Explain a request.
#[derive(Debug, Args)]
pub struct Explain {
    /// The configuration file.
    #[arg(long, short, env = "SERIN_CONFIG", value_name = "FILE")]
    pub config: PathBuf,

    /// The host of the request.
    #[arg(long, value_name = "HOST")]
    pub host: String,

    /// The path of the request, with the query if there is one.
    #[arg(long, default_value = "/", value_name = "PATH")]
    pub path: String,

    /// The method of the request.
    #[arg(long, short = 'X', default_value = "GET", value_name = "METHOD")]
    pub method: String,

    /// A header of the request; may be repeated.
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE")]
    pub headers: Vec<String>,

    /// The id of the user, put where the route looks for it first.
    #[arg(long, value_name = "ID")]
    pub user: Option<String>,

    /// The address of the client.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), value_name = "IP")]
    pub client: IpAddr,

    /// The request comes through a trusted proxy.
    #[arg(long)]
    pub trusted: bool,

    /// Print JSON, as the admin API does.
    #[arg(long)]
    pub json: bool,
}

/// Translate the configuration of another proxy into one of Serin's.
#[derive(Debug, Subcommand)]
pub enum Import {
    /// Print a configuration for the Ingresses of ingress-nginx in a file of manifests, with their canaries; on
    /// standard error, what it leaves out. With the Services in the file as well, ports by name are known.
    IngressNginx {
        /// The manifests, as `kubectl get ingress,service -o yaml` prints them; `-` for standard input.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// A configuration file, and where its revisions are kept.
#[derive(Clone, Debug, Args)]
pub struct Revisions {
    /// The configuration file.
    #[arg(long, short, env = "SERIN_CONFIG", value_name = "FILE")]
    pub config: PathBuf,

    /// Where revisions are kept (default: `history.directory` of the file).
    #[arg(long, value_name = "DIRECTORY")]
    pub directory: Option<PathBuf>,
}

/// List the revisions of the configuration file.
#[derive(Debug, Args)]
pub struct History {
    /// Of which file.
    #[command(flatten)]
    pub of: Revisions,

    /// Print what one revision says: its number, or the beginning of its hash.
    #[arg(long, value_name = "REVISION")]
    pub show: Option<Which>,
}

/// Make the configuration file say again what it said before.
#[derive(Debug, Args)]
pub struct Rollback {
    /// Of which file.
    #[command(flatten)]
    pub of: Revisions,

    /// Which revision: its number, or the beginning of its hash (default: the latest that says something else
    /// than the file, so that a second rollback undoes the first).
    #[arg(long, value_name = "REVISION")]
    pub to: Option<Which>,

    /// Only print what would change.
    #[arg(long)]
    pub dry_run: bool,
}

/// Ask a running proxy whether it is ready.
#[derive(Debug, Args)]
pub struct Healthcheck {
    /// What is asked. With `https`, every certificate is believed.
    #[arg(
        env = "SERIN_HEALTHCHECK_URL",
        default_value = "http://127.0.0.1:9901/readyz",
        value_name = "URL"
    )]
    pub url: Url,

    /// How long the answer may take.
    #[arg(long, default_value = "2s", value_name = "DURATION", value_parser = crate::config::value::duration)]
    pub timeout: Duration,
}

/// Run the demonstration.
#[derive(Debug, Args)]
pub struct Demo {
    /// Where the proxy listens (default: 127.0.0.1:8080); an existing file says so itself.
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,

    /// Where the admin API listens (default: 127.0.0.1:9901); an existing file says so itself.
    #[arg(long, value_name = "IP:PORT")]
    pub admin: Option<SocketAddr>,

    /// Requests per second of the built-in clients; 0 for none.
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub rate: u32,

    /// End after this long (default: at Ctrl-C).
    #[arg(long, value_name = "DURATION", value_parser = crate::config::value::duration)]
    pub duration: Option<Duration>,

    /// Write the configuration to this file, if there is none yet, and follow it: edit it and see
    /// the split change.
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// How to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}
