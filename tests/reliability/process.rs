//! Processes: Serin, upstreams, and what the kernel says of them. Each is killed when it is dropped.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{sleep, timeout};

use crate::Error;
use crate::client::Connection;
use crate::config::Config;
use crate::port::HeldPort;
use crate::upstream::READY;

/// How long anything may take to start, or a configuration to come into force.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks at whether something is so.
const LOOK: Duration = Duration::from_millis(20);

/// A process that is killed with its handle.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pid: Pid,
}

/// A version of the service, in a process of its own at an address that it keeps.
#[derive(Debug)]
pub(crate) struct Upstream {
    name: String,
    port: HeldPort,
    running: Option<(Process, ChildStdin)>,
}

/// Where a Serin runs: its addresses, its files, and the process that is there now.
#[derive(Debug)]
pub(crate) struct Serin {
    pub(crate) process: Process,
    place: Place,
}

/// What outlives a process.
#[derive(Debug)]
struct Place {
    binary: PathBuf,
    web: HeldPort,
    admin: HeldPort,
    file: PathBuf,
    log: PathBuf,
    launch: Launch,
}

/// How `serin run` is started.
#[derive(Clone, Debug)]
pub(crate) enum Launch {
    Plainly,
    /// With `--takeover` and this socket.
    TakingOver(PathBuf),
    /// With at most so many descriptors.
    WithDescriptors(u32),
}

/// As many descriptors as this user may have, for this process and those that it starts.
pub(crate) fn raise_descriptor_limit() -> Result<(), Error> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

/// How many descriptors a process may have.
pub(crate) fn descriptor_limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

// === impl Process ===

impl Process {
    fn spawn(command: &mut Command) -> Result<Self, Error> {
        let child = command.kill_on_drop(true).spawn()?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let pid = pid.ok_or("a process that ends at once")?;
        Ok(Self { child, pid })
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<(), Error> {
        Ok(kill_process(self.pid, signal)?)
    }

    /// SIGKILL, and waits for the end.
    pub(crate) async fn kill(&mut self) -> Result<(), Error> {
        Ok(self.child.kill().await?)
    }

    /// Waits for it to end by itself.
    pub(crate) async fn ended(&mut self, within: Duration) -> Result<ExitStatus, Error> {
        let ended = timeout(within, self.child.wait()).await;
        Ok(ended.map_err(|_| format!("a process goes on after {within:?}"))??)
    }

    /// How it has ended; `None` while it runs.
    pub(crate) fn end(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Resident memory.
    pub(crate) fn memory_kib(&self) -> Result<u64, Error> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(number.ok_or("no VmRSS")?.parse()?)
    }

    pub(crate) fn descriptors(&self) -> Result<usize, Error> {
        let directory = format!("/proc/{}/fd", self.pid.as_raw_nonzero());
        Ok(fs::read_dir(directory)?.count())
    }

    /// CPU time so far, of all threads, in user space and in the kernel.
    pub(crate) fn cpu(&self) -> Result<Duration, Error> {
        let stat = self.proc("stat")?;
        // The name of the program, which comes before, may hold spaces.
        let (_, fields) = stat.rsplit_once(") ").ok_or("no fields in stat")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let [user, system] = [fields.get(11), fields.get(12)];
        let ticks: u64 =
            user.ok_or("no utime")?.parse::<u64>()? + system.ok_or("no stime")?.parse::<u64>()?;
        Ok(Duration::from_secs_f64(
            ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
        ))
    }

    fn proc(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(format!("/proc/{}/{file}", self.pid.as_raw_nonzero()))
    }
}

// === impl Upstream ===

impl Upstream {
    pub(crate) async fn start(name: &str) -> Result<Self, Error> {
        let mut upstream = Self {
            name: name.to_owned(),
            port: HeldPort::new()?,
            running: None,
        };
        upstream.restart().await?;
        Ok(upstream)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// SIGKILL.
    pub(crate) async fn kill(&mut self) -> Result<(), Error> {
        match self.running.take() {
            Some((mut process, _)) => process.kill().await,
            None => Ok(()),
        }
    }

    /// Starts it at the address that it had.
    pub(crate) async fn restart(&mut self) -> Result<(), Error> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["--upstream", &self.name])
            .args(["--listen", &self.address().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = Process::spawn(&mut command)?;
        let input = process.child.stdin.take().ok_or("no standard input")?;
        let output = process.child.stdout.take().ok_or("no standard output")?;
        let mut line = String::new();
        timeout(PATIENCE, BufReader::new(output).read_line(&mut line)).await??;
        if line.trim() != READY {
            return Err(format!("the upstream {} does not start", self.name).into());
        }
        self.running = Some((process, input));
        Ok(())
    }

    /// The status of all responses from now on.
    pub(crate) async fn answer_with(&mut self, status: u16) -> Result<(), Error> {
        let (_, input) = self.running.as_mut().ok_or("the upstream is dead")?;
        input.write_all(format!("{status}\n").as_bytes()).await?;
        Ok(())
    }
}

// === impl Serin ===

impl Serin {
    /// Starts a Serin with its files in `directory`, and waits until it is ready.
    pub(crate) async fn start(
        binary: &Path,
        directory: &Path,
        config: &Config,
        launch: Launch,
    ) -> Result<Self, Error> {
        let web = HeldPort::new()?;
        let port = web.address().port();
        let place = Place {
            binary: binary.to_owned(),
            admin: HeldPort::new()?,
            file: directory.join(format!("serin-{port}.yaml")),
            log: directory.join(format!("serin-{port}.log")),
            launch,
            web,
        };
        place.write(config)?;
        let mut process = place.spawn()?;
        place.wait_until_ready(&mut process).await?;
        Ok(Self { process, place })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.place.web.address()
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.place.admin.address()
    }

    /// Starts another process in the same place, and takes its handle. Returns the one before.
    pub(crate) fn succeed(&mut self) -> Result<Process, Error> {
        Ok(std::mem::replace(&mut self.process, self.place.spawn()?))
    }

    /// Waits until the process is ready.
    pub(crate) async fn wait_until_ready(&mut self) -> Result<(), Error> {
        self.place.wait_until_ready(&mut self.process).await
    }

    /// Writes the configuration anew and waits until it is in force.
    pub(crate) async fn reload(&self, config: &Config) -> Result<(), Error> {
        let before = self.revision().await?;
        self.place.write(config)?;
        let deadline = Instant::now() + PATIENCE;
        while self.revision().await? <= before {
            if Instant::now() > deadline {
                return Err("a changed configuration is not taken over".into());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    async fn revision(&self) -> Result<u64, Error> {
        let status = ask(self.admin(), "/api/v1/config/status").await?;
        let status: serde_json::Value = serde_json::from_slice(&status.body)?;
        Ok(status["revision"].as_u64().ok_or("no revision")?)
    }
}

// === impl Launch ===

impl Launch {
    /// Whether this binary can be started like that.
    pub(crate) async fn is_known_to(&self, binary: &Path) -> Result<bool, Error> {
        match self {
            Self::TakingOver(_) => {
                let help = Command::new(binary)
                    .args(["run", "--help"])
                    .output()
                    .await?;
                Ok(String::from_utf8_lossy(&help.stdout).contains("--takeover"))
            }
            Self::Plainly | Self::WithDescriptors(_) => Ok(true),
        }
    }
}

// === impl Place ===

impl Place {
    /// As an editor does: a new file, renamed over the old one.
    fn write(&self, config: &Config) -> Result<(), Error> {
        let text = config.text(self.web.address(), self.admin.address());
        let new = self.file.with_extension("new");
        fs::write(&new, text)?;
        Ok(fs::rename(new, &self.file)?)
    }

    fn spawn(&self) -> Result<Process, Error> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let mut command = match self.launch {
            Launch::WithDescriptors(limit) => {
                let mut shell = Command::new("sh");
                shell
                    .args(["-c", "ulimit -n \"$0\" && exec \"$@\"", &limit.to_string()])
                    .arg(&self.binary);
                shell
            }
            Launch::Plainly | Launch::TakingOver(_) => Command::new(&self.binary),
        };
        command.args(["run", "--config"]).arg(&self.file);
        if let Launch::TakingOver(socket) = &self.launch {
            command.arg("--takeover").arg(socket);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        Process::spawn(&mut command)
    }

    async fn wait_until_ready(&self, process: &mut Process) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        while !is_ready(self.admin.address()).await {
            if let Some(status) = process.end()? {
                let log = fs::read_to_string(&self.log)?;
                return Err(format!("serin ended ({status}): {}", log.trim_end()).into());
            }
            if Instant::now() > deadline {
                return Err("serin is not ready".into());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }
}

/// Whether the Serin with this admin listener says that it may be sent requests.
pub(crate) async fn is_ready(admin: SocketAddr) -> bool {
    let asked = ask(admin, "/readyz").await;
    asked.is_ok_and(|answer| answer.status == 200)
}

async fn ask(admin: SocketAddr, path: &str) -> Result<crate::client::Answer, Error> {
    let mut connection = Connection::open(admin).await?;
    let answer = timeout(PATIENCE, connection.ask("GET", path)).await?;
    Ok(answer.map_err(|broken| format!("{path}: {broken:?}"))?)
}
