//! A Redis for the rows that count in one.

use std::{
    io::{BufRead as _, BufReader},
    net::TcpListener,
    process::{Child, Command, Stdio},
};

/// A redis-server of one's own.
pub(crate) struct Redis(Child);

impl Redis {
    pub(crate) fn start() -> anyhow::Result<(Self, u16)> {
        for _ in 0..10 {
            let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            let mut child = Command::new("redis-server")
                .args(["--bind", "127.0.0.1", "--save", "", "--port"])
                .arg(port.to_string())
                .stdout(Stdio::piped())
                .spawn()
                .map_err(|e| anyhow::anyhow!("these tests need redis-server: {e}"))?;
            let output = child.stdout.take();
            let redis = Self(child);
            let lines = output.into_iter().flat_map(|o| BufReader::new(o).lines());
            let mut lines = lines.map_while(Result::ok);
            if lines.any(|l| l.contains("Ready to accept connections")) {
                std::thread::spawn(move || lines.for_each(drop));
                return Ok((redis, port));
            }
        }
        anyhow::bail!("redis-server does not start")
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It may have ended already.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}
