//! The `serin` program: command line in, exit code out.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;

use clap::Parser;
use serin::app::{App, Drained, Follow};
use serin::cli::{self, Cli, Command, Explain, LogFormat};
use serin::config::Problems;
use serin::config::file::json_schema;
use serin::config::load::{Loaded, load, load_list};
use serin::config::watch::POLL_INTERVAL;
use serin::control::offline_snapshot;
use serin::demo::{self, Screen};
use serin::descriptors;
use serin::explain::{Question, explain};
use serin::healthcheck;
use serin::history::rollback::{Failure, History};
use serin::import;
use serin::server::sockets::Given;
use serin::snapshot::Snapshot;
use serin::systemd;
use serin::takeover::{self, Post, Predecessor, Successor};
use serin::telemetry::process_log::{FLUSH_LIMIT, ProcessLog};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

// glibc's allocator gives the memory of a replaced user list back late, and musl's is slow.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A file that cannot be used.
const INVALID: u8 = 1;
/// A file that cannot be read, or a command line that makes no sense.
const USAGE: u8 = 2;
/// A fault of Serin's own, as a panic exits.
const FAULT: u8 = 101;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let log = match start_logging(&cli) {
        Ok(log) => log,
        Err(reason) => return fail(USAGE, &format!("error: --log: {reason}")),
    };
    let code = match cli.command {
        Command::Run(run) => run_proxy(&run),
        Command::Check(check) => run_check(&check),
        Command::Explain(question) => run_explain(&question),
        Command::Schema => print(&json_schema()),
        Command::Import(cli::Import::IngressNginx { file }) => run_import(&file),
        Command::History(options) => run_history(&options).unwrap_or_else(|code| code),
        Command::Rollback(options) => run_rollback(&options).unwrap_or_else(|code| code),
        Command::Healthcheck(check) => run_healthcheck(&check),
        Command::Demo(options) => run_demo(&options),
    };
    log.flush(FLUSH_LIMIT);
    code
}

fn run_proxy(run: &cli::Run) -> ExitCode {
    // Before anything else, since a SIGHUP that nobody handles ends the process.
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return fail(USAGE, &format!("error: signals cannot be handled: {error}")),
    };
    let given = systemd::sockets();
    descriptors::raise();
    let post = match run.takeover.as_deref().map(Post::prepare).transpose() {
        Ok(post) => post,
        Err(error) => return fail(USAGE, &format!("error: {error}")),
    };
    let run = run.clone();
    let Some(started) = signals.unless_told(move || start(&run, given)) else {
        info!("told to end before it served");
        return ExitCode::SUCCESS;
    };
    let Started { app, predecessor } = match started {
        Ok(started) => started,
        Err(code) => return code,
    };
    app.open();
    // Only now the predecessor lets go: whatever went wrong before has changed nothing for it.
    if let Some(predecessor) = predecessor {
        predecessor.relieve();
    }
    systemd::notify(systemd::State::Ready);
    signals.run_until_told(app, post)
}

/// A proxy that is ready to serve.
struct Started {
    app: App,
    /// Who serves in its place.
    predecessor: Option<Predecessor>,
}

/// Does everything that may take long before there is anything to serve.
fn start(run: &cli::Run, mut given: Vec<Given>) -> Result<Started, ExitCode> {
    let loaded = load_or_fail(&run.config)?;
    for warning in &loaded.warnings.problems {
        warn!("{}:{warning}", loaded.path.display());
    }
    let found = run.takeover.as_deref().map(Predecessor::find).transpose();
    let found = found.map_err(|error| fail(USAGE, &format!("error: {error}")))?;
    let (predecessor, inherited) = found.flatten().unzip();
    given.extend(inherited.unwrap_or_default());
    let follow = Follow::Files {
        poll: POLL_INTERVAL,
    };
    let app = App::prepare(loaded, follow, given).map_err(|problems| fail_with(&problems))?;
    app.await_first_checks();
    Ok(Started { app, predecessor })
}

/// Why a running proxy ends.
enum End {
    /// It was told to.
    Told,
    /// Another process serves in its place.
    Succeeded(Successor),
}

/// The signals that steer a running proxy.
struct Signals {
    runtime: tokio::runtime::Runtime,
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    reopen: Signal,
    /// Handled by nobody, so that a limit on the size of files is an error of a write to the access
    /// log, and not the end of the process.
    _file_size: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let guard = runtime.enter();
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        let hangup = signal(SignalKind::hangup())?;
        let reopen = signal(SignalKind::user_defined1())?;
        let file_size = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
        let _file_size = signal(file_size)?;
        drop(guard);
        Ok(Self {
            runtime,
            terminate,
            interrupt,
            hangup,
            reopen,
            _file_size,
        })
    }

    /// Starts on a thread of its own; `None` when told to end meanwhile: there is nobody to take leave of,
    /// and the thread ends with the process.
    fn unless_told(
        &mut self,
        start: impl FnOnce() -> Result<Started, ExitCode> + Send + 'static,
    ) -> Option<Result<Started, ExitCode>> {
        let (sender, started) = tokio::sync::oneshot::channel();
        // The process may be about to end without it.
        std::thread::spawn(move || drop(sender.send(start())));
        let told = told(&mut self.terminate, &mut self.interrupt);
        self.runtime.block_on(async {
            tokio::select! {
                started = started => {
                    let panicked = |_| Err(fail(FAULT, "error: the start panicked"));
                    Some(started.unwrap_or_else(panicked))
                }
                _ = told => None,
            }
        })
    }

    /// Lives until SIGTERM or SIGINT, or until a successor serves; reloads at SIGHUP, and opens the
    /// access log anew at SIGUSR1. A second signal to end does so at once; where a successor serves, the
    /// first one changes nothing, as whoever stops its service need not know that it is ending already.
    fn run_until_told(self, app: App, post: Option<Post>) -> ExitCode {
        let Self {
            runtime,
            mut terminate,
            mut interrupt,
            mut hangup,
            mut reopen,
            _file_size,
        } = self;
        let sinks = app.sinks();
        let end = runtime.block_on(async {
            let open = post.and_then(opened);
            let mut succeeded = pin!(succeeded(open, &app));
            loop {
                tokio::select! {
                    _ = told(&mut terminate, &mut interrupt) => break End::Told,
                    successor = succeeded.as_mut() => break End::Succeeded(successor),
                    _ = hangup.recv() => app.request_reload(),
                    _ = reopen.recv() => sinks.reopen(),
                }
            }
        });
        let is_told = matches!(end, End::Told);
        let (sender, drained) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let drained = match end {
                End::Told => {
                    systemd::notify(systemd::State::Stopping);
                    app.shut_down()
                }
                End::Succeeded(successor) => app.give_way(|| successor.confirm()),
            };
            sender.send(drained)
        });
        let told_again = async {
            if !is_told {
                told(&mut terminate, &mut interrupt).await;
                info!("it is ending already; the next signal ends it at once");
            }
            told(&mut terminate, &mut interrupt).await
        };
        let reopening = async {
            while reopen.recv().await.is_some() {
                sinks.reopen();
            }
        };
        runtime.block_on(async {
            tokio::select! {
                outcome = drained => match outcome {
                    Ok(Drained::Clean) => info!("drained"),
                    // The app has said so.
                    Ok(Drained::CutOff(_)) => {}
                    Err(_) => return fail(FAULT, "error: the drain panicked"),
                },
                code = told_again => std::process::exit(code),
                () = reopening => {}
            }
            ExitCode::SUCCESS
        })
    }
}

/// Waits for a signal to end, and returns what a process exits with that such a signal kills.
async fn told(terminate: &mut Signal, interrupt: &mut Signal) -> i32 {
    tokio::select! {
        _ = terminate.recv() => 143,
        _ = interrupt.recv() => 130,
    }
}

/// Where a successor finds this process. Without it the process serves all the same.
fn opened(post: Post) -> Option<takeover::Open> {
    post.open()
        .inspect_err(|error| error!(%error, "no successor can take over"))
        .ok()
}

/// Waits until another process serves in place of this one.
async fn succeeded(open: Option<takeover::Open>, app: &App) -> Successor {
    match open {
        Some(open) => open.succeeded(|| app.sockets()).await,
        None => std::future::pending().await,
    }
}

fn load_or_fail(file: &Path) -> Result<Loaded, ExitCode> {
    // Asked before opening, since opening a pipe waits for somebody to write.
    let readable = match std::fs::metadata(file) {
        Ok(metadata) if metadata.is_file() => std::fs::File::open(file).map(drop),
        Ok(_) => Err(std::io::Error::other("not a regular file")),
        Err(error) => Err(error),
    };
    match readable {
        Ok(()) => load(file, &mut load_list).map_err(|problems| fail_with(&problems)),
        Err(error) => Err(fail(USAGE, &format!("error: {}: {error}", file.display()))),
    }
}

fn run_healthcheck(check: &cli::Healthcheck) -> ExitCode {
    match healthcheck::ask(&check.url, check.timeout) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => fail(INVALID, &format!("unhealthy: {reason}")),
    }
}

fn run_import(file: &Path) -> ExitCode {
    let text = match file.to_str() {
        Some("-") => std::io::read_to_string(std::io::stdin()),
        _ => std::fs::read_to_string(file),
    };
    let text = match text {
        Ok(text) => text,
        Err(error) => return fail(USAGE, &format!("error: {}: {error}", file.display())),
    };
    match import::ingress_nginx::import(&text) {
        Ok(imported) => {
            for note in &imported.notes {
                tell(&format!("note: {note}"));
            }
            let code = print(&imported.config);
            for problem in &imported.mending {
                tell(&format!("error: to be mended by hand: {problem}"));
            }
            match &imported.mending[..] {
                [] => code,
                _ => ExitCode::from(INVALID),
            }
        }
        Err(reason) => fail(INVALID, &format!("error: {} {reason}", file.display())),
    }
}

fn history_of(revisions: &cli::Revisions) -> Result<History, ExitCode> {
    History::of(&revisions.config, revisions.directory.as_deref()).map_err(failed)
}

fn run_history(options: &cli::History) -> Result<ExitCode, ExitCode> {
    let history = history_of(&options.of)?;
    Ok(match &options.show {
        Some(which) => print(&history.show(which).map_err(failed)?),
        None => print(&history.to_string()),
    })
}

fn run_rollback(options: &cli::Rollback) -> Result<ExitCode, ExitCode> {
    let history = history_of(&options.of)?;
    let rollback = history.back(options.to.as_ref()).map_err(failed)?;
    let file = options.of.config.display();
    let revision = rollback.revision();
    if rollback.is_there() {
        return Ok(print(&format!(
            "{file}: says what {revision} says already\n"
        )));
    }
    let diff = rollback.diff();
    if options.dry_run {
        return Ok(print(&diff));
    }
    rollback.put_back().map_err(failed)?;
    Ok(print(&format!("{diff}{file}: back to {revision}\n")))
}

fn failed(failure: Failure) -> ExitCode {
    match failure {
        Failure::Unreadable(reason) => fail(USAGE, &format!("error: {reason}")),
        Failure::Refused(reason) => fail(INVALID, &format!("error: {reason}")),
        Failure::Problems(problems) => fail_with(&problems),
    }
}

fn run_check(check: &cli::Check) -> ExitCode {
    let loaded = match load_or_fail(&check.file) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    if !loaded.warnings.problems.is_empty() {
        complain(&loaded.warnings);
    }
    let ids: usize = loaded.lists.values().map(|list| list.list.len()).sum();
    print(&format!(
        "{}: ok: {}, {}, {} with {}\n",
        check.file.display(),
        count(loaded.config.routes.len(), "route"),
        count(loaded.config.backends.len(), "backend"),
        count(loaded.config.user_lists.len(), "user list"),
        count(ids, "id"),
    ))
}

fn run_explain(options: &cli::Explain) -> ExitCode {
    let loaded = match load_or_fail(&options.config) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    let snapshot = offline_snapshot(&loaded);
    let question = match question(options, &snapshot) {
        Ok(question) => question,
        Err(reason) => return fail(USAGE, &format!("error: {reason}")),
    };
    let explanation = explain(&snapshot, &question, &mut || fastrand::u64(..));
    if options.json {
        match serde_json::to_string_pretty(&explanation) {
            Ok(json) => print(&(json + "\n")),
            Err(error) => fail(INVALID, &format!("error: {error}")),
        }
    } else {
        print(&explanation.to_string())
    }
}

fn question(options: &cli::Explain, snapshot: &Snapshot) -> Result<Question, String> {
    let headers: Result<Vec<_>, _> = options
        .headers
        .iter()
        .map(|line| {
            line.split_once(':')
                .map(|(name, value)| (name.trim(), value.trim()))
                .ok_or(line)
        })
        .collect();
    let headers =
        headers.map_err(|line| format!("`{line}` is not a header: write `name: value`"))?;
    let Explain {
        host,
        path,
        method,
        client,
        trusted,
        ..
    } = options;
    let mut question = Question::new(host, path, method, headers, *client, *trusted)?;
    if let Some(user) = &options.user {
        question.set_user(snapshot, user)?;
    }
    Ok(question)
}

fn run_demo(options: &cli::Demo) -> ExitCode {
    let mut to_stdout = |text: &str| {
        print(text);
    };
    let mut screen = Screen {
        print: &mut to_stdout,
        is_terminal: std::io::stdout().is_terminal(),
    };
    match demo::run(options, &mut screen) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problems) => fail_with(&problems),
    }
}

fn start_logging(cli: &Cli) -> Result<ProcessLog, Box<dyn std::error::Error>> {
    let default = match cli.command {
        // Its table should not be torn by lines of the log.
        Command::Demo(_) => "warn",
        _ => "info",
    };
    let filter = EnvFilter::builder().parse(cli.log.as_deref().unwrap_or(default))?;
    let log = ProcessLog::start(std::io::stderr())?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(log.clone());
    match cli.log_format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(log)
}

/// Prints to standard output; a reader that has gone (`serin schema | head`) is no failure.
fn print(text: &str) -> ExitCode {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => ExitCode::from(USAGE),
        _ => ExitCode::SUCCESS,
    }
}

fn complain(problems: &Problems) {
    // Nothing can be done when standard error is closed.
    let _ = writeln!(
        std::io::stderr(),
        "{}",
        problems.render(std::io::stderr().is_terminal())
    );
}

fn fail_with(problems: &Problems) -> ExitCode {
    complain(problems);
    let (errors, all) = (problems.errors(), problems.problems.len());
    let mut summary = count(errors, "problem");
    if all > errors {
        summary += &format!(" and {}", count(all - errors, "warning"));
    }
    fail(INVALID, &format!("{}: {summary}", problems.file.display()))
}

fn count(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

fn fail(code: u8, message: &str) -> ExitCode {
    tell(message);
    ExitCode::from(code)
}

fn tell(message: &str) {
    // Nothing can be done when standard error is closed.
    let _ = writeln!(std::io::stderr(), "{message}");
}
