//! Reads the bulk of one image on a thread of its own, so that the copying out of the socket and the copying into the
//! program's memory go on side by side, and a fault never waits for the former.
//!
//! Owns the thread. Refuses to know what was asked: whoever takes a reply matches it. Invariants: no more than
//! [`AHEAD`] replies lie here untaken, the holder then stops by itself; the thread ends with its [`Reader`].

use super::claims::Bell;
use super::lane::Pool;
use dunlin_proto::pages::{REPLY_BYTES, ReplyHeader};
use rustix::net::{RecvFlags, recv};
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

/// So many replies are read ahead of who installs them.
const AHEAD: usize = 4;

/// One reply as it came: its header, and a buffer that begins with its data.
pub(super) type Whole = ([u8; REPLY_BYTES], Vec<u8>);

/// The thread, as its lane sees it.
pub(super) struct Reader {
    stream: TcpStream,
    buffers: Sender<Vec<u8>>,
    replies: Receiver<io::Result<Whole>>,
    /// How many replies are (as good as) in the channel.
    ready: Arc<AtomicUsize>,
}

impl Reader {
    /// Reads a blocking stream from now on; the bell is rung for each reply.
    pub(super) fn start(stream: TcpStream, bell: Arc<Bell>, pool: &mut Pool) -> io::Result<Reader> {
        let (buffers, empty) = channel();
        let (send, replies) = channel();
        let ready = Arc::new(AtomicUsize::new(0));
        for _ in 0..AHEAD {
            let _ = buffers.send(pool.take());
        }
        let (from, counter) = (stream.try_clone()?, ready.clone());
        let work = move || {
            while let Ok(buffer) = empty.recv() {
                let whole = read_one(&from, buffer);
                let failed = whole.is_err();
                counter.fetch_add(1, Ordering::Release);
                if send.send(whole).is_err() {
                    return;
                }
                bell.ring();
                if failed {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("dunlin-bulk".into()).spawn(work)?;
        Ok(Reader {
            stream,
            buffers,
            replies,
            ready,
        })
    }

    /// Is there something to take?
    pub(super) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire) > 0
    }

    /// The next reply, if one is here; why there are no more, once.
    pub(super) fn take(&mut self, pool: &mut Pool) -> io::Result<Option<Whole>> {
        let whole = match self.replies.try_recv() {
            Ok(whole) => whole?,
            Err(TryRecvError::Empty) => return Ok(None),
            Err(TryRecvError::Disconnected) => return Err(io::ErrorKind::UnexpectedEof.into()),
        };
        self.ready.fetch_sub(1, Ordering::AcqRel);
        // If the thread has ended meanwhile, the next call says why.
        let _ = self.buffers.send(pool.take());
        Ok(Some(whole))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // The thread sees the end. If the other side has ended it first, so be it.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn read_one(stream: &TcpStream, mut buffer: Vec<u8>) -> io::Result<Whole> {
    let mut header = [0; REPLY_BYTES];
    fill(stream, &mut header)?;
    let bytes = ReplyHeader::decode(&header)?.payload_bytes();
    let payload = buffer.get_mut(..bytes).ok_or(io::ErrorKind::InvalidData)?;
    fill(stream, payload)?;
    Ok((header, buffer))
}

/// All of it, with as few calls as the kernel allows.
fn fill(stream: &TcpStream, mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        match recv(stream, &mut *into, RecvFlags::WAITALL) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((read, _)) => into = &mut into[read..],
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
