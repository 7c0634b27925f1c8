//! The seam between the daemon and what moves processes.
//!
//! Owns the trait. Refuses to know how a move is done. The daemon finds the node where a process is, checks whose it is,
//! and hands over; connections of a move and of its pages are handed over with their stream.

use super::Node;
use crate::processes::exits::Ended;
use dunlin_proto::control::{ExitStatus, MoveRequest, Reply};
use dunlin_proto::ids::{ImageId, MoveId, Pid, Slot};
use dunlin_proto::peer::Caller;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;

/// Tells the caller of a command something that is not the last word; an error means that nobody listens any more.
pub type Tell<'a> = &'a mut dyn FnMut(Reply) -> io::Result<()>;

/// What moves processes. Every method may take as long as it needs: each is called in a thread of its own.
pub trait Mover: Send + Sync {
    /// Moves a process that is here and that the caller may move, to another node that exists. Returns the last word.
    fn move_process(&self, node: &Arc<Node>, caller: Caller, request: &MoveRequest, tell: Tell<'_>) -> Reply;

    /// Would a process that is here move (to that node)? Returns the last word.
    fn can_move(&self, node: &Arc<Node>, caller: Caller, pid: Pid, to: Option<Slot>) -> Reply;

    /// Serves a connection of a move until it ends.
    fn serve_move(&self, node: &Arc<Node>, from: Slot, id: MoveId, stream: TcpStream);

    /// Serves a connection of an image's pages until it ends.
    fn serve_pages(&self, node: &Arc<Node>, from: Slot, id: ImageId, stream: TcpStream);

    /// Makes the surrogate `pid` of this node end with this status, so that its parent's kernel tells the parent.
    /// Unregisters it from the nest first, and takes it out of [`Node::hidden`] when it is gone. One that does not exist
    /// is as good as ended.
    fn end_surrogate(&self, node: &Arc<Node>, pid: Pid, status: ExitStatus) -> io::Result<()>;

    /// A process that had come here from elsewhere has ended; its home is told by the daemon.
    fn resident_ended(&self, node: &Arc<Node>, pid: Pid, ended: Ended);
}
