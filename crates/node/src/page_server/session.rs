//! One page connection at the holder: hello, then requests answered in order.

use super::{Image, ImageStore, ServeError};
use dunlin_proto::pages::{
    HELLO_BYTES, Hello, Lane, MAX_PAYLOAD_BYTES, MAX_SCAN_RANGES, REPLY_BYTES, REQUEST_BYTES, ReplyHeader, Request,
    Welcome,
};
use rustix::net::RecvFlags;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// After an answered fault the next one is awaited awake: a wake across CPUs costs more than a page.
const SPIN: Duration = Duration::from_micros(60);
/// Requests read at once.
const REQUESTS: usize = 64;
/// A client that does not say hello in time is none.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn serve(store: &ImageStore, mut stream: TcpStream) -> Result<(), ServeError> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello)?;
    let hello = Hello::decode(&hello).map_err(io::Error::from)?;
    stream.set_read_timeout(None)?;
    let Some((image, sent)) = store.claim(hello.image, hello.client) else {
        stream.write_all(&Welcome::UnknownImage.encode())?;
        return Err(ServeError::UnknownImage(hello.image));
    };
    stream.write_all(&Welcome::Come.encode())?;
    let mut requests = Requests::new(&stream, hello.lane);
    let mut out = vec![0; REPLY_BYTES + MAX_PAYLOAD_BYTES];
    while let Some(request) = requests.next()? {
        match request {
            Request::Pages { tag, start, want } => {
                let present = image.present(start, want)?;
                let header = ReplyHeader::Pages { tag, start, present };
                let end = REPLY_BYTES + header.payload_bytes();
                out[..REPLY_BYTES].copy_from_slice(&header.encode());
                image.read(start, present, &mut out[REPLY_BYTES..end])?;
                (&stream).write_all(&out[..end])?;
                sent.fetch_add(u64::from(present.count_ones()), Ordering::Relaxed);
            }
            Request::Scan { tag, start, pages } => scan(&image, &stream, tag, start, pages)?,
            Request::Release { tag } => {
                // First the claim, then the answer: whoever has it can rely on it.
                store.release(hello.image, hello.client);
                (&stream).write_all(&ReplyHeader::Released { tag }.encode())?;
                return Ok(());
            }
        }
    }
    Ok(())
}

fn scan(image: &Image, mut stream: &TcpStream, tag: u32, start: u64, pages: u64) -> Result<(), ServeError> {
    let send = |ranges: &[(u64, u64)], scanned_to: u64, last: bool| {
        let header = ReplyHeader::Scan {
            tag,
            scanned_to,
            ranges: ranges.len() as u32,
            last,
        };
        let mut out = header.encode().to_vec();
        for (start, end) in ranges {
            out.extend(start.to_le_bytes());
            out.extend(end.to_le_bytes());
        }
        Ok(stream.write_all(&out)?)
    };
    image.scan(start, pages, send, MAX_SCAN_RANGES)
}

/// The requests of one connection.
struct Requests<'a> {
    stream: &'a TcpStream,
    lane: Lane,
    buffer: [u8; REQUEST_BYTES * REQUESTS],
    /// What of the buffer is read and not handed out.
    from: usize,
    to: usize,
}

impl<'a> Requests<'a> {
    fn new(stream: &'a TcpStream, lane: Lane) -> Self {
        Requests {
            stream,
            lane,
            buffer: [0; REQUEST_BYTES * REQUESTS],
            from: 0,
            to: 0,
        }
    }

    /// `None` when the client has ended the connection.
    fn next(&mut self) -> io::Result<Option<Request>> {
        while self.to - self.from < REQUEST_BYTES {
            self.buffer.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
            match self.fill()? {
                0 if self.to == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => self.to += more,
            }
        }
        let bytes = self.buffer[self.from..self.from + REQUEST_BYTES]
            .try_into()
            .expect("so many bytes");
        self.from += REQUEST_BYTES;
        Ok(Some(Request::decode(bytes)?))
    }

    fn fill(&mut self) -> io::Result<usize> {
        let room = &mut self.buffer[self.to..];
        if self.lane == Lane::Faults {
            let until = Instant::now() + SPIN;
            loop {
                match rustix::net::recv(self.stream, &mut *room, RecvFlags::DONTWAIT) {
                    Ok((_, read)) => return Ok(read),
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
                if Instant::now() >= until {
                    break;
                }
                // On a small machine the one who will ask next may need this very CPU.
                std::thread::yield_now();
            }
        }
        loop {
            match (&mut &*self.stream).read(room) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                answer => return answer,
            }
        }
    }
}
