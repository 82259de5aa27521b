//! A load at a fixed rate that does not overlook waiting: `rate ADDRESS CONNECTIONS RATE SECONDS PATH`.
//!
//! Every request has an appointed time, and its latency counts from then, also when its connection was still
//! busy with the one before (the "coordinated omission" that a load without appointments commits). Waits with
//! `ppoll`, whose time limit is finer than the millisecond of `epoll_wait`. Prints its figures as JSON.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program, not the library"
)]

use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long answers may take after the last request.
const PATIENCE: Duration = Duration::from_secs(5);

struct Load {
    address: SocketAddr,
    connections: u32,
    /// Between the appointed times of two requests, on whatever connection.
    interval: Duration,
    length: Duration,
    path: String,
    /// The size of the answer's body, which the path says.
    body: usize,
}

/// What has become of the requests.
#[derive(Default)]
struct Done {
    /// How long each took from its appointed time.
    answered: Vec<Duration>,
    errors: u32,
}

struct Connection {
    stream: TcpStream,
    /// When its next request is due.
    due: Instant,
    /// When the one that waits for its answer was due.
    waiting: Option<Instant>,
    answer: Vec<u8>,
}

fn main() -> ExitCode {
    let load = match Load::from_arguments() {
        Ok(load) => load,
        Err(error) => {
            eprintln!("error: {error}\nusage: rate ADDRESS CONNECTIONS RATE SECONDS PATH");
            return ExitCode::FAILURE;
        }
    };
    match load.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Load {
    fn from_arguments() -> Result<Self, Box<dyn Error>> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let [address, connections, rate, seconds, path] = &arguments[..] else {
            return Err("five arguments are needed".into());
        };
        Ok(Self {
            address: address.parse()?,
            connections: connections.parse()?,
            interval: Duration::from_secs_f64(1.0 / rate.parse::<f64>()?),
            length: Duration::from_secs(seconds.parse()?),
            path: path.clone(),
            body: path.trim_start_matches('/').parse()?,
        })
    }

    fn run(&self) -> std::io::Result<()> {
        let start = Instant::now() + Duration::from_millis(50);
        let end = start + self.length;
        let mut connections = (0..self.connections)
            .map(|number| Connection::open(self.address, start + self.interval * number))
            .collect::<std::io::Result<Vec<_>>>()?;
        let mut done = Done::default();
        loop {
            let now = Instant::now();
            for connection in &mut connections {
                if connection.waiting.is_none() && connection.due <= now && connection.due < end {
                    connection.send(&self.path, done.answered.len())?;
                    connection.due += self.interval * self.connections;
                }
            }
            let is_busy = |one: &Connection| one.waiting.is_some() || one.due < end;
            if !connections.iter().any(is_busy) || now > end + PATIENCE {
                break;
            }
            self.wait(&connections, now, end)?;
            for connection in &mut connections {
                if let Some(due) = connection.waiting
                    && connection.has_answer(self.body)?
                {
                    done.answered.push(due.elapsed());
                    done.errors += u32::from(!connection.answer.starts_with(b"HTTP/1.1 200"));
                    connection.answer.clear();
                    connection.waiting = None;
                }
            }
        }
        for connection in &connections {
            // What was never answered, or never even sent, has waited until now.
            let appointments = std::iter::successors(Some(connection.due), |due| {
                Some(*due + self.interval * self.connections)
            });
            let unsent = appointments.take_while(|due| *due < end);
            for due in connection.waiting.into_iter().chain(unsent) {
                done.answered.push(due.elapsed());
                done.errors += 1;
            }
        }
        done.report(self.length);
        Ok(())
    }

    /// Waits for an answer, or for the next request to be due.
    fn wait(&self, connections: &[Connection], now: Instant, end: Instant) -> std::io::Result<()> {
        let mut waiting: Vec<PollFd<'_>> = connections
            .iter()
            .filter(|one| one.waiting.is_some())
            .map(|one| PollFd::new(&one.stream, PollFlags::IN))
            .collect();
        let due = connections
            .iter()
            .filter(|one| one.waiting.is_none() && one.due < end)
            .map(|one| one.due.saturating_duration_since(now))
            .min();
        let limit = due.unwrap_or(PATIENCE).min(PATIENCE);
        let limit = Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: limit.subsec_nanos().into(),
        };
        poll(&mut waiting, Some(&limit))?;
        Ok(())
    }
}

impl Done {
    fn report(mut self, length: Duration) {
        self.answered.sort_unstable();
        let point = |part: f64| {
            let index = (self.answered.len() as f64 * part) as usize;
            let found = self.answered.get(index).or(self.answered.last());
            found.map_or(0, Duration::as_micros)
        };
        println!(
            r#"{{"requests":{},"rate":{:.0},"p50":{},"p99":{},"p999":{},"errors":{}}}"#,
            self.answered.len(),
            self.answered.len() as f64 / length.as_secs_f64(),
            point(0.5),
            point(0.99),
            point(0.999),
            self.errors,
        );
    }
}

impl Connection {
    fn open(address: SocketAddr, due: Instant) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            due,
            waiting: None,
            answer: Vec::new(),
        })
    }

    fn send(&mut self, path: &str, turn: usize) -> std::io::Result<()> {
        let user = turn % 1024;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: shop.example.com\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n\
             Accept: text/html,application/json\r\nx-user-id: user-{user}\r\n\r\n"
        );
        self.waiting = Some(self.due);
        self.stream.write_all(request.as_bytes())
    }

    /// Reads what there is; true once the answer is whole.
    fn has_answer(&mut self, body: usize) -> std::io::Result<bool> {
        let mut chunk = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.answer.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let head = memchr::memmem::find(&self.answer, b"\r\n\r\n");
        Ok(head.is_some_and(|head| self.answer.len() >= head + 4 + body))
    }
}
