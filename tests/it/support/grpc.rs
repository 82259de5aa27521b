//! A service of gRPC and its clients, by tonic.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio_stream::{Stream, StreamExt};
use tonic::codegen::BoxFuture;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::server::StreamingService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// What goes both ways.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Note {
    #[prost(string, tag = "1")]
    pub(crate) text: String,
    #[prost(uint32, tag = "2")]
    pub(crate) number: u32,
    #[prost(message, optional, tag = "3")]
    author: Option<Author>,
    #[prost(string, repeated, tag = "4")]
    tags: Vec<String>,
    #[prost(int64, tag = "5")]
    large_number: i64,
    #[prost(bool, tag = "6")]
    is_read: bool,
    #[prost(bytes = "vec", tag = "7")]
    blob: Vec<u8>,
    #[prost(int32, tag = "8")]
    kind: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Author {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint32, tag = "2")]
    age: u32,
    #[prost(string, tag = "3")]
    pen_name: String,
}

type Notes = Pin<Box<dyn Stream<Item = Result<Note, Status>> + Send>>;

/// A service `tests.Notes` with a name, and these methods:
///
/// * `Echo` answers each note with itself, as it comes;
/// * `Count` answers with `number` notes;
/// * `Sum` answers with the sum of all numbers;
/// * `Name` answers with the name, and the metadata `x-seen` with what `x-ask` said;
/// * `Fail` fails with the code `number`, the message `text` and metadata;
/// * `FailLate` does so after a note;
/// * `Hang` answers nothing, ever; `HangLate` hangs after a note.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

struct State {
    name: String,
    hanging: AtomicUsize,
    connections: AtomicUsize,
}

/// Counts a call that hangs, until it is taken back.
struct Hanging(Arc<State>);

struct Method {
    name: String,
    state: Arc<State>,
}

impl Service {
    pub(crate) async fn start(name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            name: name.to_owned(),
            hanging: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
        });
        tokio::spawn(accept(listener, Arc::clone(&state)));
        Self { address, state }
    }

    /// Calls that hang now.
    pub(crate) fn hanging(&self) -> usize {
        self.state.hanging.load(Ordering::SeqCst)
    }

    /// Connections accepted so far.
    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    while let Ok((stream, _)) = listener.accept().await {
        state.connections.fetch_add(1, Ordering::SeqCst);
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let name = request.uri().path().rsplit('/').next().unwrap().to_owned();
                let state = Arc::clone(&state);
                async move {
                    let mut server = tonic::server::Grpc::new(ProstCodec::<Note, Note>::default());
                    Ok::<_, std::convert::Infallible>(
                        server.streaming(Method { name, state }, request).await,
                    )
                }
            });
            let builder = http2::Builder::new(TokioExecutor::new());
            // The proxy may close the connection at any time.
            let _ = builder
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

impl StreamingService<Note> for Method {
    type Response = Note;
    type ResponseStream = Notes;
    type Future = BoxFuture<Response<Notes>, Status>;

    fn call(&mut self, request: Request<Streaming<Note>>) -> Self::Future {
        let (name, state) = (self.name.clone(), Arc::clone(&self.state));
        Box::pin(async move { answer(&name, state, request).await })
    }
}

async fn answer(
    name: &str,
    state: Arc<State>,
    request: Request<Streaming<Note>>,
) -> Result<Response<Notes>, Status> {
    let asked = request.metadata().get("x-ask").cloned();
    let mut notes = request.into_inner();
    if name == "Echo" {
        return Ok(Response::new(Box::pin(notes)));
    }
    let first = notes.message().await?.unwrap_or_default();
    match name {
        "Count" => {
            let notes = (0..first.number).map(|number| Ok(note("count", number)));
            Ok(Response::new(Box::pin(tokio_stream::iter(
                notes.collect::<Vec<_>>(),
            ))))
        }
        "Sum" => {
            let mut sum = first.number;
            while let Some(note) = notes.message().await? {
                sum += note.number;
            }
            Ok(one(note("sum", sum)))
        }
        "Name" => {
            let mut response = one(note(&state.name, 0));
            if let Some(asked) = asked {
                response.metadata_mut().insert("x-seen", asked);
            }
            Ok(response)
        }
        "Fail" | "FailAtOnce" => Err(failure(&first)),
        "FailLate" => {
            let notes = [Ok(note("first", 1)), Err(failure(&first))];
            Ok(Response::new(Box::pin(tokio_stream::iter(notes))))
        }
        "Hang" => {
            let _hanging = Hanging::new(&state);
            std::future::pending().await
        }
        "HangLate" => {
            let hanging = Hanging::new(&state);
            let rest = tokio_stream::pending().map(move |note| {
                let _ = &hanging;
                note
            });
            let notes = tokio_stream::once(Ok(note("first", 1))).chain(rest);
            Ok(Response::new(Box::pin(notes)))
        }
        _ => Err(Status::unimplemented("no such method")),
    }
}

fn failure(note: &Note) -> Status {
    let mut status = Status::new(Code::from(note.number as i32), note.text.clone());
    status
        .metadata_mut()
        .insert("x-why", "tests".parse().unwrap());
    status
}

fn one(note: Note) -> Response<Notes> {
    Response::new(Box::pin(tokio_stream::once(Ok(note))))
}

pub(crate) fn note(text: &str, number: u32) -> Note {
    Note {
        text: text.to_owned(),
        number,
        ..Note::default()
    }
}

impl Hanging {
    fn new(state: &Arc<State>) -> Self {
        state.hanging.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(state))
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.0.hanging.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A client with one connection.
#[derive(Clone)]
pub(crate) struct Caller {
    channel: Channel,
}

impl Caller {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        Self {
            channel: endpoint.connect().await.unwrap(),
        }
    }

    /// Calls a method with a stream of notes.
    pub(crate) async fn stream(
        &self,
        method: &str,
        request: Request<impl Stream<Item = Note> + Send + 'static>,
    ) -> Result<Response<Streaming<Note>>, Status> {
        let codec = ProstCodec::<Note, Note>::default();
        let mut client = self.client().await?;
        client.streaming(request, path(method), codec).await
    }

    /// Calls a method with one note, for one.
    pub(crate) async fn unary(
        &self,
        method: &str,
        request: Request<Note>,
    ) -> Result<Response<Note>, Status> {
        let codec = ProstCodec::<Note, Note>::default();
        let mut client = self.client().await?;
        client.unary(request, path(method), codec).await
    }

    async fn client(&self) -> Result<tonic::client::Grpc<Channel>, Status> {
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        let ready = client.ready().await;
        ready.map_err(|error| Status::unknown(error.to_string()))?;
        Ok(client)
    }
}

fn path(method: &str) -> PathAndQuery {
    PathAndQuery::try_from(format!("/tests.Notes/{method}")).unwrap()
}
