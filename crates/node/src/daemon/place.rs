//! A daemon's place on its machine: the state directory and the two sockets.
//!
//! Owns the lock, the pidfile and the threads that accept connections. Refuses to know what is said on them. Invariants:
//! the lock is held as long as the daemon lives, and no longer, whatever kills it; there are never more than
//! [`MAX_CONNECTIONS`] connections on a socket.

use super::node::Node;
use super::{DaemonError, inbound, io_error};
use crate::control;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// So many connections on one socket at a time; further ones are closed at once.
const MAX_CONNECTIONS: usize = 4096;

/// How long a daemon that was killed may take to be gone, and how often that is looked at.
const DYING_WITHIN: Duration = Duration::from_secs(2);
const DYING_LOOK: Duration = Duration::from_millis(2);

/// A claimed state directory.
pub struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Makes the directory if need be, and claims it.
    pub fn claim(path: &Path) -> Result<StateDir, DaemonError> {
        let shown = path.display().to_string();
        fs::create_dir_all(path).map_err(io_error(shown.clone()))?;
        fs::set_permissions(path, Permissions::from_mode(0o755)).map_err(io_error(shown.clone()))?;
        let options = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.join("daemon.lock"));
        let lock = options.map_err(io_error(format!("{shown}/daemon.lock")))?;
        let deadline = Instant::now() + DYING_WITHIN;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                // It may have been killed, with a thread inside the kernel still.
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(DYING_LOOK),
                Err(Errno::WOULDBLOCK) => return Err(DaemonError::Busy { state_dir: path.into() }),
                Err(e) => return Err(io_error(format!("{shown}/daemon.lock"))(e.into())),
            }
        }
        let place = StateDir {
            path: path.to_owned(),
            _lock: lock,
        };
        place.write_pidfile().map_err(io_error(format!("{shown}/daemon.pid")))?;
        Ok(place)
    }

    /// The control socket, which any user may connect to.
    pub fn control_socket(&self) -> Result<UnixListener, DaemonError> {
        let path = self.path.join("control.sock");
        // Left by a daemon that was killed: the lock says that none lives.
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error(path.display().to_string())(e)),
            _ => {}
        }
        let bind = || {
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, Permissions::from_mode(0o666))?;
            Ok(listener)
        };
        bind().map_err(io_error(path.display().to_string()))
    }

    /// Leaves nothing that says a daemon is here.
    pub fn leave(self) {
        for name in ["control.sock", "daemon.pid"] {
            if let Err(e) = fs::remove_file(self.path.join(name)) {
                tracing::warn!("{}/{name}: {e}", self.path.display());
            }
        }
    }

    /// The PID alone does not say whether a later process has it: the start time, as /proc/PID/stat has it, goes along.
    fn write_pidfile(&self) -> io::Result<()> {
        let stat = fs::read_to_string("/proc/self/stat")?;
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let start = fields.split_whitespace().nth(19).ok_or(io::ErrorKind::InvalidData)?;
        let mut file = File::create(self.path.join("daemon.pid"))?;
        writeln!(file, "{} {start}", std::process::id())
    }
}

/// A thread that accepts the connections of one socket.
pub struct Acceptor {
    stop: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

impl Acceptor {
    /// Of peers.
    pub fn peers(listener: TcpListener, node: Arc<Node>) -> io::Result<Acceptor> {
        listener.set_nonblocking(true)?;
        Acceptor::start(
            "peer",
            listener,
            |l| l.accept().map(|(stream, _)| stream),
            move |stream| {
                stream.set_nonblocking(false)?;
                inbound::serve(&node, stream)
            },
        )
    }

    /// Of the command line.
    pub fn control(listener: UnixListener, node: Arc<Node>) -> io::Result<Acceptor> {
        listener.set_nonblocking(true)?;
        Acceptor::start(
            "control",
            listener,
            |l| l.accept().map(|(stream, _)| stream),
            move |stream| {
                stream.set_nonblocking(false)?;
                control::serve(&node, stream)
            },
        )
    }

    fn start<L: AsFd + Send + 'static, S: Send + 'static>(
        name: &'static str,
        listener: L,
        accept: impl Fn(&L) -> io::Result<S> + Send + 'static,
        serve: impl Fn(S) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Acceptor> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = stop.clone();
        let serve = Arc::new(serve);
        let connections = Arc::new(AtomicUsize::new(0));
        let accept_all = move || loop {
            let mut polled = [
                PollFd::new(&listener, PollFlags::IN),
                PollFd::new(&*stopped, PollFlags::IN),
            ];
            if poll(&mut polled, None).is_ok() && polled[1].revents().contains(PollFlags::IN) {
                return;
            }
            match accept(&listener) {
                Ok(_) if connections.load(Ordering::Relaxed) >= MAX_CONNECTIONS => {
                    tracing::warn!("more than {MAX_CONNECTIONS} {name} connections");
                }
                Ok(stream) => spawn(name, stream, serve.clone(), connections.clone()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // Out of descriptors, perhaps: not to be tried again at full speed.
                Err(e) => {
                    tracing::warn!("accepting a {name} connection: {e}");
                    thread::sleep(std::time::Duration::from_millis(50));
                }
            }
        };
        let thread = thread::Builder::new()
            .name(format!("accept {name}"))
            .spawn(accept_all)?;
        Ok(Acceptor { stop, thread })
    }

    /// Accepts no more, and closes the socket. Connections that are served go on.
    pub fn stop(self) {
        let stopped = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if stopped.is_err() || self.thread.join().is_err() {
            tracing::error!("a socket goes on accepting connections");
        }
    }
}

fn spawn<S: Send + 'static>(
    name: &'static str,
    stream: S,
    serve: Arc<impl Fn(S) -> io::Result<()> + Send + Sync + 'static>,
    connections: Arc<AtomicUsize>,
) {
    connections.fetch_add(1, Ordering::Relaxed);
    let counted = connections.clone();
    let spawned = thread::Builder::new().name(name.into()).spawn(move || {
        if let Err(e) = serve(stream) {
            tracing::debug!("a {name} connection ended: {e}");
        }
        counted.fetch_sub(1, Ordering::Relaxed);
    });
    if let Err(e) = spawned {
        connections.fetch_sub(1, Ordering::Relaxed);
        tracing::error!("no thread to serve a {name} connection: {e}");
    }
}
