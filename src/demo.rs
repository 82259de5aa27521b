//! `serin demo`: two versions of a service, the proxy, some clients, and a table that compares, in
//! one process.
//!
//! Nothing here is a shortcut through the proxy: the clients come in over its listener, the
//! upstreams are reached over sockets, and the table is made from the metrics that Prometheus would
//! scrape.

mod clients;
mod table;
mod upstreams;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tracing::warn;

use crate::app::{App, Follow};
use crate::cli::Demo;
use crate::config::Problems;
use crate::config::load::{Loaded, load, load_list, load_text};
use crate::config::watch::POLL_INTERVAL;
use crate::discovery::Locator;
use crate::server::sockets;

use table::Table;
use upstreams::Behaviour;

const CONFIG: &str = include_str!("demo/config.yaml");
const STABLE: &str = "shop-stable";
const CANARY: &str = "shop-canary";
const TICK: Duration = Duration::from_secs(1);

/// Where output goes, and whether it can be drawn over.
pub struct Screen<'s> {
    /// Takes text.
    pub print: &'s mut dyn FnMut(&str),
    /// Whether the cursor can be moved.
    pub is_terminal: bool,
}

/// Runs the demonstration to its end: `duration`, or Ctrl-C.
///
/// # Errors
///
/// Addresses in use, or a configuration file that cannot be used.
pub fn run(options: &Demo, screen: &mut Screen<'_>) -> Result<(), Problems> {
    let (loaded, follow) = configuration(options)?;
    let sockets = [(STABLE, upstreams::STABLE), (CANARY, upstreams::CANARY)]
        .into_iter()
        .flat_map(|(name, behaviour)| {
            endpoints(&loaded, name)
                .into_iter()
                .map(move |address| (address, behaviour))
        })
        .map(|(address, behaviour)| match sockets::listen(address) {
            Ok(socket) => Ok((socket, behaviour)),
            Err(error) => Err(Problems::whole_file(
                &loaded.path,
                format!("cannot start the upstream at {address}: {error}"),
            )),
        })
        .collect::<Result<Vec<(TcpListener, Behaviour)>, Problems>>()?;
    let app = App::start(loaded, follow)?;
    let Some(web) = app
        .live()
        .load()
        .listeners
        .first()
        .map(|listener| listener.settings.address)
    else {
        return Ok(());
    };
    (screen.print)(&introduction(web, app.admin(), options.config.as_deref()));

    let rate = options.rate;
    // These threads end with the process: they hold nothing that needs an end of its own.
    thread::spawn(move || on_a_runtime(upstreams::serve(sockets)));
    thread::spawn(move || on_a_runtime(clients::run(web, rate)));
    on_a_runtime(compare(&app, options.duration, screen));
    app.shut_down();
    Ok(())
}

async fn compare(app: &App, duration: Option<Duration>, screen: &mut Screen<'_>) {
    let end = duration.map(|duration| Instant::now() + duration);
    let mut table = Table::new(&app.metrics().render());
    let mut tick = tokio::time::interval(TICK);
    tick.tick().await;
    let mut hangup = match signal(SignalKind::hangup()) {
        Ok(hangup) => hangup,
        Err(error) => return warn!(%error, "signals cannot be handled"),
    };
    loop {
        tokio::select! {
            _ = hangup.recv() => app.request_reload(),
            _ = tick.tick() => table.draw(&app.metrics().render(), screen),
            _ = tokio::signal::ctrl_c() => return,
            () = sleep_until(end) => return table.draw(&app.metrics().render(), screen),
        }
    }
}

/// The configuration: built in, or in the file that the user wants to edit.
fn configuration(options: &Demo) -> Result<(Loaded, Follow), Problems> {
    let Some(path) = &options.config else {
        let text = built_in(options, free_addresses());
        return Ok((
            load_text(&PathBuf::from("demo.yaml"), &text, &mut load_list)?,
            Follow::Nothing,
        ));
    };
    if path.exists() && (options.listen.is_some() || options.admin.is_some()) {
        let message = "the file exists and says where to listen: leave out --listen and --admin";
        return Err(Problems::whole_file(path, message));
    }
    if !path.exists() {
        fs::write(path, built_in(options, free_addresses())).map_err(|error| {
            Problems::whole_file(path, format!("the file cannot be written: {error}"))
        })?;
    }
    Ok((
        load(path, &mut load_list)?,
        Follow::Files {
            poll: POLL_INTERVAL,
        },
    ))
}

fn built_in(options: &Demo, [stable, canary]: [SocketAddr; 2]) -> String {
    let address = |given: Option<SocketAddr>, port: u16| {
        let default = || SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        given.unwrap_or_else(default).to_string()
    };
    CONFIG
        .replace("@LISTEN@", &address(options.listen, 8080))
        .replace("@ADMIN@", &address(options.admin, 9901))
        .replace("@STABLE@", &stable.to_string())
        .replace("@CANARY@", &canary.to_string())
}

/// Two addresses that nobody listens on now. Both are held while the second is looked for, so that
/// they differ.
fn free_addresses() -> [SocketAddr; 2] {
    let fallback = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let held: [_; 2] = std::array::from_fn(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let address = |position: usize| {
        held[position]
            .as_ref()
            .ok()
            .and_then(|socket| socket.local_addr().ok())
    };
    [
        address(0).unwrap_or(fallback(9001)),
        address(1).unwrap_or(fallback(9002)),
    ]
}

fn endpoints(loaded: &Loaded, backend: &str) -> Vec<SocketAddr> {
    let backend = loaded
        .config
        .backends
        .iter()
        .find(|known| *known.name == *backend);
    let locators = backend.map_or(&[][..], |backend| &backend.endpoints);
    let address = |locator: &Locator| match locator {
        Locator::Address(address) => Some(*address),
        Locator::Name(_) => None,
    };
    locators.iter().filter_map(address).collect()
}

fn introduction(web: SocketAddr, admin: SocketAddr, config: Option<&Path>) -> String {
    let edit = match config {
        Some(file) => format!("  Edit {} and save: the split follows.\n", file.display()),
        None => "  Run it with `--config demo.yaml` to get a file whose weights you can edit.\n"
            .to_owned(),
    };
    format!(
        "\nSerin splits requests between two versions of a demo shop.\n\
         The canary is a little slower and fails now and then.\n\n\
         {}{}{}{}{edit}\n",
        line(
            format!("curl -i -H 'x-user-id: alice' http://{web}/"),
            "the same user always gets the same version"
        ),
        line(
            format!("curl -i -H 'x-canary: shop-canary' http://{web}/"),
            "a tester names the version"
        ),
        line(
            format!("curl http://{admin}/metrics"),
            "what Prometheus scrapes"
        ),
        line(
            format!("curl http://{admin}/api/v1/routes"),
            "what is in force"
        ),
    )
}

fn line(command: String, purpose: &str) -> String {
    format!("  {command:<58} {purpose}\n")
}

async fn sleep_until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

fn on_a_runtime<T>(job: impl Future<Output = T>) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    Some(runtime.block_on(tokio::task::LocalSet::new().run_until(job)))
}

impl std::fmt::Debug for Screen<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen")
            .field("is_terminal", &self.is_terminal)
            .finish_non_exhaustive()
    }
}
