//! Talking to a daemon over its control socket.
//!
//! Owns one connection and its turns. Refuses to know commands; what an answer means is the caller's.

use dunlin_proto::control::{NodeStatus, Reply, Request};
use dunlin_proto::frame;
use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A connection to a daemon, good for one request.
#[derive(Debug)]
pub struct Connection {
    replies: BufReader<UnixStream>,
    socket: PathBuf,
}

impl Connection {
    /// Connects to the daemon that listens at `socket`.
    pub fn open(socket: &Path) -> io::Result<Connection> {
        let stream = UnixStream::connect(socket)?;
        Ok(Connection {
            replies: BufReader::new(stream),
            socket: socket.into(),
        })
    }

    /// Where it leads.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Bounds every wait for an answer; without it, an answer may take for ever.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.replies.get_ref().set_read_timeout(Some(timeout))?;
        self.replies.get_ref().set_write_timeout(Some(timeout))
    }

    /// Sends the request.
    pub fn send(&mut self, request: &Request) -> io::Result<()> {
        frame::write(self.replies.get_mut(), request)
    }

    /// The next answer.
    pub fn receive(&mut self) -> io::Result<Reply> {
        frame::read(&mut self.replies)
    }

    /// Sends the request and waits for the one answer to it.
    pub fn ask(&mut self, request: &Request) -> io::Result<Reply> {
        self.send(request)?;
        self.receive()
    }

    /// A second handle on the stream, for what follows a `Run`.
    pub fn input(&self) -> io::Result<UnixStream> {
        self.replies.get_ref().try_clone()
    }
}

/// Asks a daemon how it is; an error, in words, when it does not answer in time.
pub fn status(socket: &Path, timeout: Duration) -> Result<NodeStatus, String> {
    let ask = || {
        let mut connection = Connection::open(socket)?;
        connection.set_timeout(timeout)?;
        connection.ask(&Request::Status)
    };
    match ask() {
        Ok(Reply::Status(status)) => Ok(status),
        Ok(Reply::Error(failure)) => Err(failure.message),
        Ok(other) => Err(format!("answered {other:?} to a question about its status")),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Err("does not listen on its control socket".into())
        }
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Err("did not answer in time".into())
        }
        Err(e) => Err(format!("did not answer: {e}")),
    }
}
