//! The control socket: what the command line asks of its node's daemon.
//!
//! Owns the socket's connections, the callers' identities (`SO_PEERCRED`, never a message) and the rule of who may do what:
//! root everything, a user with his own processes. Refuses to know how anything is done; each command is handed to the
//! part that does it, on the node where the process is. Invariant: every connection gets a last reply, whatever fails.

mod commands;
pub mod gateway;
mod run;

pub use commands::{forwarded, wait_here};

use crate::daemon::node::{Node, failure};
use dunlin_proto::control::{FailureKind, Reply, Request};
use dunlin_proto::frame;
use dunlin_proto::peer::Caller;
use rustix::net::sockopt::socket_peercred;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// How long a caller may take to say what it wants.
const ASK_WITHIN: Duration = Duration::from_secs(10);

/// Who is at the other end.
#[derive(Debug, Clone)]
struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

/// Serves one connection.
pub fn serve(node: &Arc<Node>, stream: UnixStream) -> io::Result<()> {
    let credentials = socket_peercred(&stream)?;
    let identity = Identity {
        uid: credentials.uid.as_raw(),
        gid: credentials.gid.as_raw(),
        groups: dunlin_sys::peergroups::peer_groups(&stream)?,
    };
    stream.set_read_timeout(Some(ASK_WITHIN))?;
    let request: Request = match frame::read(&mut &stream) {
        Ok(request) => request,
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            let message = format!("the daemon does not understand this request: {e}");
            let hint = Some("is it of the same version as this command? `dunlin version`, `dunlin lab status`");
            return frame::write(
                &mut &stream,
                &Reply::Error(failure(FailureKind::Invalid, message, hint)),
            );
        }
        Err(e) => return Err(e),
    };
    stream.set_read_timeout(None)?;
    let last = match request {
        Request::Run(spec) => match run::serve(node, identity, spec, &stream) {
            Ok(()) => return Ok(()),
            Err(failure) => Reply::Error(failure),
        },
        other => commands::local(node, Caller::user(identity.uid), &other, &stream),
    };
    frame::write(&mut &stream, &last)
}
