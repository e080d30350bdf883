//! Who talks through the proxy: plain sockets, so that nothing but the kernel and the proxy is in between.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

/// Nothing here is far away.
const LIMIT: Duration = Duration::from_secs(5);

/// Answers each request with `NAME peer=IP` and the request's head; one request a connection.
pub(crate) fn serve_http(name: &'static str, address: SocketAddr) {
    serve(address, move |stream| {
        let peer = stream.peer_addr()?.ip().to_canonical();
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? == 1 {
            head.extend(byte);
        }
        let body = format!("{name} peer={peer} {}", String::from_utf8_lossy(&head));
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
    });
}

/// Answers the first line with `NAME: LINE`.
pub(crate) fn serve_lines(name: &'static str, address: SocketAddr) {
    serve(address, move |stream| {
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\n") && stream.read(&mut byte)? == 1 {
            line.extend(byte);
        }
        write!(stream, "{name}: {}", String::from_utf8_lossy(&line))
    });
}

/// Until the test ends, on a thread that inherits the caller's namespace.
fn serve(
    address: SocketAddr,
    answer: impl Fn(&mut TcpStream) -> io::Result<()> + Send + Sync + Copy + 'static,
) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                drop(answer(&mut stream));
            });
        }
    });
}

/// The whole response, head and body.
pub(crate) fn get(address: SocketAddr, host: &str, path: &str) -> io::Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let answer = exchange(address, &request)?;
    match answer.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => Ok(answer),
    }
}

/// Sends `text`; gives all that comes back.
pub(crate) fn exchange(address: SocketAddr, text: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(text.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
