//! What becomes of users when things break: a real `serin` between real processes, under continuous
//! load, while faults are injected.
//!
//! ```console
//! $ cargo test --release --test reliability                            # everything but the soak; some 20 minutes
//! $ cargo test --release --test reliability -- --list
//! $ cargo test --release --test reliability -- refuse-canary takeover  # these rows alone
//! $ cargo test --release --test reliability -- soak                    # 20 million requests; up to 40 minutes
//! $ cargo test --test reliability -- --quick                           # to see whether it works
//! ```
//!
//! It writes `tests/RELIABILITY.md`, in which the rows that did not run stay as they are, and ends
//! with 1 when a row does not hold what it promises. `--quick` writes nothing, since its figures say
//! little. `cargo test` alone does not run it: it takes long, and measures.
//!
//! Everything stays on the loopback interface, and every process ends with this one. In the order in
//! which a reader may want the modules: `row` is a line of the table and `rows` are all of them;
//! `stage` starts what stands around a row, by `process` and `upstream`; `load` asks, by `client`;
//! `record` is what became of it, and `report` writes it down.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program, not the library"
)]

mod client;
mod config;
#[path = "../it/support/fault.rs"]
#[allow(dead_code, reason = "the integration tests need more of it")]
mod fault;
mod load;
#[path = "../it/support/port.rs"]
mod port;
mod process;
mod record;
mod report;
mod row;
mod rows;
mod stage;
mod upstream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use report::Report;
use row::{End, Finding, Pace, Row};

/// Anything that keeps a row from being measured.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// Injects faults into a running Serin under load, and writes down what its users saw.
#[derive(Debug, Parser)]
#[command(name = "reliability")]
struct Cli {
    /// The rows to run (default: all that are not only run on demand).
    rows: Vec<String>,

    /// Print the names of the rows.
    #[arg(long)]
    list: bool,

    /// Take a fraction of the time, and write no file.
    #[arg(long)]
    quick: bool,

    /// Write the table to this file (default: tests/RELIABILITY.md).
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// The binary to try (default: the one built along with this program).
    #[arg(long, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_serin"))]
    serin: PathBuf,

    /// Be an upstream of this name: how this program starts its other processes.
    #[arg(long, hide = true, requires = "listen")]
    upstream: Option<String>,

    #[arg(long, hide = true)]
    listen: Option<SocketAddr>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let (Some(name), Some(address)) = (&cli.upstream, cli.listen) {
        return exit_code(upstream::run(name, address).map(|()| true));
    }
    if cli.list {
        for row in rows::all() {
            println!("{:<32} {}", row.name, row.fault);
        }
        return ExitCode::SUCCESS;
    }
    exit_code(run(&cli))
}

fn exit_code(outcome: Result<bool, Error>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether every row held what it promises.
fn run(cli: &Cli) -> Result<bool, Error> {
    let rows = chosen(&cli.rows)?;
    process::raise_descriptor_limit()?;
    let pace = Pace {
        quick: cli.quick,
        serin: cli.serin.clone(),
    };
    let mut report = Report::open(report_file(cli), &pace)?;
    let mut all_kept = true;
    for row in rows {
        println!("{}: {}", row.name, row.fault);
        // Each has a runtime of its own, so that nothing of the one before goes on.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let finding = runtime.block_on(row.run(&pace));
        runtime.shutdown_background();
        let finding =
            finding.unwrap_or_else(|error| Finding::cut_short(End::Aborted, error.to_string()));
        println!("{}", finding.for_people(&row));
        all_kept &= finding.is_as_promised(&row);
        report.put(&row, &finding)?;
    }
    Ok(all_kept)
}

fn chosen(names: &[String]) -> Result<Vec<Row>, Error> {
    let mut rows = rows::all();
    if let Some(unknown) = names
        .iter()
        .find(|name| rows.iter().all(|row| row.name != **name))
    {
        return Err(format!("there is no row `{unknown}`; --list prints all").into());
    }
    rows.retain(|row| match names {
        [] => !row.only_on_demand(),
        names => names.contains(&row.name),
    });
    Ok(rows)
}

fn report_file(cli: &Cli) -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/RELIABILITY.md");
    match (&cli.report, cli.quick) {
        (Some(file), _) => Some(file.clone()),
        (None, true) => None,
        (None, false) => Some(PathBuf::from(default)),
    }
}
