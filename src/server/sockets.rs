//! The listening sockets of the process: bound here or given from outside, and which of them can be
//! given on.
//!
//! A socket that two processes have has one queue. So a process that gets its sockets from the one
//! before it loses no connection, and neither refuses any.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tracing::{info, warn};

use crate::stream::bound_unsent;

use super::BACKLOG;

/// What the socket of the admin listener is called among those that are given: no listener has such
/// a name.
pub const ADMIN: &str = "@admin";

/// A socket that has been given to this process.
#[derive(Debug)]
pub struct Given {
    /// What the giver calls it.
    pub name: Option<String>,
    /// It listens already.
    pub socket: TcpListener,
    /// Who gave it.
    pub giver: Giver,
}

/// Who gives sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Giver {
    /// Whoever started the process, and keeps them: they cannot be bound anew.
    Starter,
    /// The process that served before, and lets them go.
    Predecessor,
}

/// A listening socket, open for as long as anybody holds it.
#[derive(Clone, Debug)]
pub struct Listening {
    /// The name of its listener, or [`ADMIN`].
    pub name: Arc<str>,
    /// The socket; it does not block.
    pub socket: Arc<TcpListener>,
}

/// A predecessor's listeners, none of which is configured here.
#[derive(Debug)]
pub struct Unrelated(Vec<String>);

/// All listening sockets of the process.
#[derive(Debug, Default)]
pub struct Sockets(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    given: Vec<Given>,
    open: Vec<(Arc<str>, Weak<TcpListener>)>,
    /// A listener for clients has the socket of a predecessor's.
    goes_on: bool,
}

// === impl Sockets ===

impl Sockets {
    /// Begins with those that were given.
    pub fn new(given: Vec<Given>) -> Self {
        Self(Mutex::new(State {
            given,
            ..State::default()
        }))
    }

    /// A socket that listens on `address`, for the listener of this name: one that was given, or a
    /// new one.
    ///
    /// # Errors
    ///
    /// Whatever the operating system has against the address.
    pub fn listen(&self, name: &Arc<str>, address: SocketAddr) -> io::Result<Arc<TcpListener>> {
        let mut state = self.lock();
        let given = state.given.iter().position(|one| one.fits(name, address));
        let socket = match given {
            Some(found) => {
                info!(listener = %name, %address, "the socket was there already");
                let is_inherited = state.given[found].giver == Giver::Predecessor;
                state.goes_on |= is_inherited && **name != *ADMIN;
                state.take(found)?
            }
            None => listen(address)?,
        };
        if let Err(error) = bound_unsent(SockRef::from(&socket)) {
            // Whoever gives a socket may know others than plain TCP.
            warn!(listener = %name, %error, "slow readers may take more of the kernel's memory");
        }
        let socket = Arc::new(socket);
        state.open.retain(|(_, open)| open.strong_count() > 0);
        state.open.push((Arc::clone(name), Arc::downgrade(&socket)));
        Ok(socket)
    }

    /// Those that listen now.
    pub fn open(&self) -> Vec<Listening> {
        let state = self.lock();
        let open = state.open.iter().filter_map(|(name, socket)| {
            let (name, socket) = (Arc::clone(name), socket.upgrade()?);
            Some(Listening { name, socket })
        });
        open.collect()
    }

    /// Everybody who wanted a socket has one: says which of those that were given are for nobody.
    ///
    /// # Errors
    ///
    /// The listeners of a predecessor none of which is configured here: what it serves is another
    /// service, which would end.
    pub fn settle(&self) -> Result<(), Unrelated> {
        let mut state = self.lock();
        state.unrelated()?;
        let open = &state.open;
        let is_used = |address: SocketAddr| {
            let mut open = open.iter().filter_map(|(_, socket)| socket.upgrade());
            open.any(|open| open.local_addr().is_ok_and(|open| open == address))
        };
        for given in &state.given {
            if let Ok(address) = given.socket.local_addr()
                && !is_used(address)
            {
                warn!(%address, "a socket was given that no listener is configured for");
            }
        }
        // Nobody else holds them: clients would wait in their queues for nothing.
        state.given.retain(|one| one.giver == Giver::Starter);
        Ok(())
    }

    /// What to do about an address that cannot be listened on, when the port is that of a socket which a
    /// predecessor gave, and which fits nothing here.
    pub fn hint(&self, port: u16) -> Option<String> {
        let state = self.lock();
        let mut given = state.given.iter();
        let holder = given.find(|one| {
            let bound = one.socket.local_addr();
            one.giver == Giver::Predecessor && bound.is_ok_and(|bound| bound.port() == port)
        })?;
        let name = holder.name.as_deref().unwrap_or_default();
        Some(format!(
            "listener `{name}` of the process that serves holds this port: take another one, or end that \
             process first"
        ))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn unrelated(&self) -> Result<(), Unrelated> {
        let listeners: Vec<String> = self.inherited().map(Given::to_string).collect();
        if self.goes_on || listeners.is_empty() {
            return Ok(());
        }
        Err(Unrelated(listeners))
    }

    /// What is left of the sockets of a predecessor's listeners for clients.
    fn inherited(&self) -> impl Iterator<Item = &Given> {
        let inherited = |one: &&Given| one.giver == Giver::Predecessor;
        let given = self.given.iter().filter(inherited);
        given.filter(|one| one.name.as_deref() != Some(ADMIN))
    }

    /// What somebody else keeps as well is kept here: the address will not be free when its listener
    /// goes and comes again.
    fn take(&mut self, position: usize) -> io::Result<TcpListener> {
        match self.given[position].giver {
            Giver::Starter => self.given[position].socket.try_clone(),
            Giver::Predecessor => Ok(self.given.remove(position).socket),
        }
    }
}

// === impl Given ===

impl Given {
    /// With port 0 the name tells listeners apart.
    fn fits(&self, name: &str, address: SocketAddr) -> bool {
        let Ok(bound) = self.socket.local_addr() else {
            return false;
        };
        let is_named = || self.name.as_deref() == Some(name);
        bound == address || (address.port() == 0 && bound.ip() == address.ip() && is_named())
    }
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref().unwrap_or_default();
        match self.socket.local_addr() {
            Ok(address) => write!(f, "`{name}` ({address})"),
            Err(_) => write!(f, "`{name}`"),
        }
    }
}

impl fmt::Display for Unrelated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listeners = self.0.join(", ");
        write!(
            f,
            "none of the listeners of the process that serves is configured here: {listeners}"
        )
    }
}

/// A socket that listens, without blocking.
///
/// # Errors
///
/// Whatever the operating system has against the address.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // A restarted proxy must not wait for connections of the old one to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: &str = "127.0.0.1:0";

    fn given(name: &str, giver: Giver) -> (Given, SocketAddr) {
        let socket = listen(ANY.parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        let name = Some(name.to_owned());
        let given = Given {
            name,
            socket,
            giver,
        };
        (given, address)
    }

    fn address_of(socket: &TcpListener) -> SocketAddr {
        socket.local_addr().unwrap()
    }

    #[test]
    fn a_given_socket_goes_to_the_listener_with_its_address_whatever_their_names() {
        let (one, address) = given("a", Giver::Predecessor);
        let sockets = Sockets::new(vec![one]);
        let other = sockets.listen(&"a".into(), "127.0.0.2:0".parse().unwrap());
        assert_ne!(address_of(&other.unwrap()), address);
        let same = sockets.listen(&"b".into(), address).unwrap();
        assert_eq!(address_of(&same), address);
    }

    #[test]
    fn with_port_0_the_name_decides() {
        let (one, address) = given("a", Giver::Predecessor);
        let sockets = Sockets::new(vec![one]);
        let other = sockets.listen(&"b".into(), ANY.parse().unwrap()).unwrap();
        assert_ne!(address_of(&other), address);
        let same = sockets.listen(&"a".into(), ANY.parse().unwrap()).unwrap();
        assert_eq!(address_of(&same), address);
    }

    #[test]
    fn a_socket_that_somebody_else_keeps_is_there_when_its_listener_comes_again() {
        let (one, address) = given("a", Giver::Starter);
        let sockets = Sockets::new(vec![one]);
        drop(sockets.listen(&"a".into(), address).unwrap());
        sockets.settle().unwrap();
        assert_eq!(
            address_of(&sockets.listen(&"a".into(), address).unwrap()),
            address
        );
    }

    #[test]
    fn a_socket_of_a_predecessor_that_nobody_wants_is_closed() {
        let (one, address) = given("a", Giver::Predecessor);
        let (two, used) = given("b", Giver::Predecessor);
        let sockets = Sockets::new(vec![one, two]);
        let _used = sockets.listen(&"b".into(), used).unwrap();
        sockets.settle().unwrap();
        assert!(std::net::TcpStream::connect(address).is_err());
    }

    #[test]
    fn who_has_only_the_admin_listener_of_a_predecessor_is_no_successor() {
        let (web, _) = given("web", Giver::Predecessor);
        let (admin, address) = given(ADMIN, Giver::Predecessor);
        let sockets = Sockets::new(vec![web, admin]);
        let _admin = sockets.listen(&ADMIN.into(), address).unwrap();
        let unrelated = sockets.settle().unwrap_err().to_string();
        assert!(unrelated.contains("`web` (127.0.0.1:"), "{unrelated}");
    }

    #[test]
    fn what_is_open_can_be_given_on_until_it_is_closed() {
        let sockets = Sockets::default();
        let one = sockets.listen(&"a".into(), ANY.parse().unwrap()).unwrap();
        let two = sockets.listen(&ADMIN.into(), ANY.parse().unwrap()).unwrap();
        let names = || {
            let open = sockets.open();
            let names = open.iter().map(|open| open.name.to_string());
            names.collect::<Vec<_>>()
        };
        assert_eq!(names(), ["a", ADMIN]);
        drop(one);
        assert_eq!(names(), [ADMIN]);
        drop(two);
    }
}
