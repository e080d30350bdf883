//! Small upstream servers for tests, on the test's own thread.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{AbortHandle, spawn_local},
};

/// What a server does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// 200 with this text.
    Ok(&'static str),
    /// This status, no body.
    Status(u16),
    /// These bytes; the connection stays.
    Raw(&'static str),
    /// These bytes, then the connection is closed.
    Close(&'static str),
    /// Nothing, for ever.
    Hang,
    /// These bytes, then everything comes back.
    Echo(&'static str),
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Number of the connection.
    pub(crate) connection: usize,
    /// Request line and headers.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// An HTTP/1.1 server.
#[derive(Clone)]
pub(crate) struct Server(Rc<Inner>);

type Handler = dyn Fn(usize, &Seen) -> Reply;

struct Inner {
    address: SocketAddr,
    reply: Box<Handler>,
    seen: RefCell<Vec<Seen>>,
    connections: Cell<usize>,
    tasks: RefCell<Vec<AbortHandle>>,
    open: watch::Sender<usize>,
}

impl Server {
    /// `reply` is given the number of the request, from 0.
    pub(crate) async fn start(reply: impl Fn(usize, &Seen) -> Reply + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Server(Rc::new(Inner {
            address: listener.local_addr().unwrap(),
            reply: Box::new(reply),
            seen: RefCell::default(),
            connections: Cell::new(0),
            tasks: RefCell::default(),
            open: watch::Sender::new(0),
        }));
        let accepting = server.clone();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let number = accepting.0.connections.get();
                accepting.0.connections.set(number + 1);
                accepting.0.open.send_modify(|open| *open += 1);
                let serving = accepting.clone();
                let task = spawn_local(async move {
                    let _closed = Closed(serving.0.clone());
                    serving.serve(stream, number).await;
                });
                accepting.0.tasks.borrow_mut().push(task.abort_handle());
            }
        });
        server
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.address
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.0.seen.borrow().clone()
    }

    pub(crate) fn connections(&self) -> usize {
        self.0.connections.get()
    }

    /// Closes all connections.
    pub(crate) fn close(&self) {
        for task in self.0.tasks.borrow_mut().drain(..) {
            task.abort();
        }
    }

    /// Waits until so many connections are open.
    pub(crate) async fn wait_open(&self, count: usize) {
        self.0
            .open
            .subscribe()
            .wait_for(|open| *open == count)
            .await
            .unwrap();
    }

    async fn serve(&self, mut stream: TcpStream, connection: usize) {
        let mut buffer = Vec::new();
        while let Some(seen) = read_request(&mut stream, &mut buffer, connection).await {
            let number = self.0.seen.borrow().len();
            let reply = (self.0.reply)(number, &seen);
            self.0.seen.borrow_mut().push(seen);
            let text = match &reply {
                Reply::Ok(text) => format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}",
                    text.len()
                ),
                Reply::Status(status) => {
                    format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n")
                }
                Reply::Raw(text) | Reply::Close(text) | Reply::Echo(text) => (*text).to_owned(),
                Reply::Hang => String::new(),
            };
            if stream.write_all(text.as_bytes()).await.is_err() {
                return;
            }
            match reply {
                Reply::Close(_) => return,
                Reply::Echo(_) => {
                    let (mut reader, mut writer) = stream.split();
                    drop(tokio::io::copy(&mut reader, &mut writer).await);
                    return;
                }
                _ => {}
            }
        }
    }
}

struct Closed(Rc<Inner>);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

async fn read_request(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    connection: usize,
) -> Option<Seen> {
    let head = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
            buffer.drain(..end + 4);
            break head;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let mut seen = Seen {
        connection,
        head,
        body: String::new(),
    };
    let length: usize = seen
        .header("content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    seen.body = String::from_utf8_lossy(&buffer[..length]).into_owned();
    buffer.drain(..length);
    Some(seen)
}

/// An address nobody listens on.
pub(crate) async fn dead_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
}
