//! The standard streams of runs: the ends that the daemon holds, here and where a moved process uses them.
//!
//! Owns pipes and terminals as streams ([`port`]), the order of a run's output ([`outbox`]), and the carriage of one
//! stream between a node and the run's origin ([`relay`] there, [`origin`] here). Refuses to know processes, users and
//! moves. Invariants: bytes of one stream are never lost, doubled or reordered while both daemons live, whatever the
//! connections between them do; everything under way is bounded; nobody who settles a stream waits for a reader of the
//! run's output.

pub mod origin;
pub mod outbox;
pub mod port;
pub mod relay;
pub mod terminal;
#[cfg(test)]
mod tests;

use dunlin_proto::stream::StreamKind;

/// At most so many bytes in one frame or piece.
pub const PIECE_BYTES: usize = 64 << 10;

/// Where a [`port::Port`] passes on what happens at it.
pub trait Side: Send + Sync {
    /// Waits until more output is wanted; `false`: none ever will be.
    fn wait_for_room(&self) -> bool;
    /// Takes output, whether there is room or not. Does not wait for anyone.
    fn output(&self, stream: StreamKind, bytes: &[u8]);
    /// So many bytes of input have been passed on.
    fn taken(&self, bytes: usize);
    /// All input has been passed on, and its end: nobody who reads the pipe may be kept from seeing it.
    fn input_ended(&self);
    /// Nobody uses the near end any more, nor will.
    fn unused(&self);
}
