//! A DNS server that answers as it is told to, over UDP and TCP.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use hickory_resolver::proto::op::{Message, OpCode, Query, ResponseCode};
use hickory_resolver::proto::rr::rdata::{CNAME, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

/// The server; it lives as long as the process.
#[derive(Clone)]
pub(crate) struct DnsServer {
    pub(crate) address: SocketAddr,
    script: Arc<Mutex<Script>>,
    queries: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Script {
    manner: Manner,
    /// By name, with the seconds for which they are valid.
    records: HashMap<String, (u32, Vec<RData>)>,
    /// Kinds of records that are asked for in vain.
    unanswered: Vec<RecordType>,
}

/// How it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Manner {
    /// What it knows; what it does not know does not exist.
    #[default]
    Well,
    /// Over UDP it says that the answer is too long for it.
    OverTcp,
    /// As `OverTcp`, and then nothing comes over TCP.
    Truncated,
    /// That it failed.
    Servfail,
    /// That nothing exists.
    Nxdomain,
    /// That there are no such records.
    Empty,
    /// With bytes that are no DNS.
    Garbage,
    /// Not at all.
    Silent,
}

impl DnsServer {
    pub(crate) fn start() -> Self {
        let (udp, tcp) = sockets();
        let server = Self {
            address: udp.local_addr().unwrap(),
            script: Arc::default(),
            queries: Arc::default(),
        };
        let over_udp = server.clone();
        thread::spawn(move || over_udp.serve_udp(&udp));
        let over_tcp = server.clone();
        thread::spawn(move || over_tcp.serve_tcp(&tcp));
        server
    }

    /// From now on it answers so.
    pub(crate) fn behave(&self, manner: Manner) {
        self.script.lock().unwrap().manner = manner;
    }

    /// From now on it does not answer when asked for such records.
    pub(crate) fn ignore(&self, kinds: &[RecordType]) {
        self.script.lock().unwrap().unanswered = kinds.to_vec();
    }

    /// From now on the host has these addresses, in this order.
    pub(crate) fn host(&self, host: &str, addresses: &[IpAddr]) {
        let records = addresses.iter().map(|address| RData::from(*address));
        self.set(host, records.collect());
    }

    /// As `host`, and they are valid for so many seconds.
    pub(crate) fn host_for(&self, seconds: u32, host: &str, addresses: &[IpAddr]) {
        let records = addresses.iter().map(|address| RData::from(*address));
        self.set_for(seconds, host, records.collect());
    }

    /// From now on this is another name for the host, for so many seconds.
    pub(crate) fn alias_for(&self, seconds: u32, alias: &str, host: &str) {
        let host = Name::from_ascii(format!("{host}.")).unwrap();
        self.set_for(seconds, alias, vec![RData::CNAME(CNAME(host))]);
    }

    /// From now on the service is at these hosts and ports, with these priorities.
    pub(crate) fn service(&self, service: &str, servers: &[(u16, &str, u16)]) {
        let records = servers.iter().map(|(priority, host, port)| {
            RData::SRV(SRV::new(
                *priority,
                0,
                *port,
                Name::from_ascii(host).unwrap(),
            ))
        });
        self.set(service, records.collect());
    }

    /// Queries that came so far.
    pub(crate) fn queries(&self) -> usize {
        self.queries.load(Ordering::SeqCst)
    }

    fn set(&self, name: &str, records: Vec<RData>) {
        self.set_for(0, name, records);
    }

    fn set_for(&self, seconds: u32, name: &str, records: Vec<RData>) {
        let mut script = self.script.lock().unwrap();
        script
            .records
            .insert(format!("{name}."), (seconds, records));
    }

    fn serve_udp(&self, socket: &UdpSocket) {
        let mut buffer = [0; 4096];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            self.queries.fetch_add(1, Ordering::SeqCst);
            let reply = self.reply(&buffer[..length], false);
            if let Some(reply) = reply {
                // Whoever asked may have gone.
                let _ = socket.send_to(&reply, peer);
            }
        }
    }

    fn serve_tcp(&self, listener: &TcpListener) {
        while let Ok((mut stream, _)) = listener.accept() {
            let server = self.clone();
            thread::spawn(move || {
                let mut length = [0; 2];
                while stream.read_exact(&mut length).is_ok() {
                    let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
                    if stream.read_exact(&mut query).is_err() {
                        return;
                    }
                    let Some(reply) = server.reply(&query, true) else {
                        continue;
                    };
                    let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
                    if stream.write_all(&[&length[..], &reply].concat()).is_err() {
                        return;
                    }
                }
            });
        }
    }

    fn reply(&self, query: &[u8], is_tcp: bool) -> Option<Vec<u8>> {
        let asked = Message::from_vec(query).unwrap();
        let script = self.script.lock().unwrap();
        let question = asked.queries[0].clone();
        if script.unanswered.contains(&question.query_type()) {
            return None;
        }
        let mut reply = Message::response(asked.metadata.id, OpCode::Query);
        reply.add_query(question.clone());
        match script.manner {
            Manner::Silent => return None,
            Manner::Truncated if is_tcp => return None,
            Manner::Garbage => {
                let mut garbage = query[..2].to_vec();
                garbage.extend_from_slice(&[0xff; 40]);
                return Some(garbage);
            }
            Manner::OverTcp | Manner::Truncated if !is_tcp => reply.metadata.truncation = true,
            Manner::Well | Manner::OverTcp | Manner::Truncated => {
                script.answer(&question, &mut reply)
            }
            Manner::Servfail => reply.metadata.response_code = ResponseCode::ServFail,
            Manner::Nxdomain => reply.metadata.response_code = ResponseCode::NXDomain,
            Manner::Empty => {}
        }
        Some(reply.to_vec().unwrap())
    }
}

impl Script {
    fn answer(&self, question: &Query, reply: &mut Message) {
        let name = question.name().to_ascii();
        let Some((seconds, records)) = self.records.get(&name) else {
            reply.metadata.response_code = ResponseCode::NXDomain;
            return;
        };
        for data in records {
            let kinds = [question.query_type(), RecordType::CNAME];
            if kinds.contains(&data.record_type()) {
                let record = Record::from_rdata(question.name().clone(), *seconds, data.clone());
                reply.add_answer(record);
            }
        }
    }
}

/// UDP and TCP on one port, as resolvers expect.
fn sockets() -> (UdpSocket, TcpListener) {
    loop {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()) {
            return (udp, tcp);
        }
    }
}
