//! TCP as daemons use it.
//!
//! Owns the socket options and the bounded connect from a given source address. Refuses to know what is said.

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, sockopt};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A peer that is silent for so long while bytes wait for it, or to a keep-alive probe, is gone.
const SILENT_FOR: Duration = Duration::from_secs(20);

/// Connects from `source`, if given, within a bound.
pub fn connect(to: SocketAddr, source: Option<IpAddr>, within: Duration) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    if let Some(source) = source.filter(|s| s.is_ipv4() == to.is_ipv4()) {
        rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
    }
    match rustix::net::connect(&socket, &to) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => await_connection(&socket, within)?,
        Err(e) => return Err(e.into()),
    }
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    tune(&stream)?;
    Ok(stream)
}

fn await_connection(socket: &impl std::os::fd::AsFd, within: Duration) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut polled = [PollFd::new(socket, PollFlags::OUT)];
        match poll(&mut polled, Some(&timeout)) {
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")),
            Ok(_) => return sockopt::socket_error(socket)?.map_err(io::Error::from),
        }
    }
}

/// Small messages leave at once; a dead peer is noticed.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, SILENT_FOR / 2)?;
    sockopt::set_tcp_keepintvl(stream, SILENT_FOR / 4)?;
    sockopt::set_tcp_user_timeout(stream, SILENT_FOR.as_millis() as u32)?;
    Ok(())
}

/// Is the connection open, with nothing to be read?
pub fn is_quiet(stream: &TcpStream) -> bool {
    let mut byte = [0u8; 1];
    matches!(
        rustix::net::recv(stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT),
        Err(Errno::AGAIN)
    )
}
