//! A network device whose far end is a descriptor: packets that go out by it can be read, those written come in by it.
//!
//! Owns its making. Refuses to know what is in a packet. Packets pass whole, as the kernel has them: not yet cut into
//! segments, checksums not yet made, and the ten bytes in front of each (`virtio_net_hdr`) say so, both ways.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// In front of each packet.
pub const HEADER_BYTES: usize = 10;
/// No packet is longer, header included (64 KiB of IP, Ethernet's header).
pub const MAX_PACKET_BYTES: usize = HEADER_BYTES + 14 + (64 << 10);

/// TUN_F_CSUM, TSO4, TSO6, TSO_ECN; and USO4, USO6 since Linux 6.2.
const OFFLOADS: [libc::c_ulong; 2] = [0x0f | 0x20 | 0x40, 0x0f];
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;

/// The far end. The device goes when its last copy is closed.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Makes the device in the calling thread's network namespace; it is down.
    pub fn make(name: &str) -> io::Result<Tap> {
        let file = File::options().read(true).write(true).open("/dev/net/tun")?;
        rustix::io::ioctl_fionbio(&file, true)?;
        // SAFETY: all-zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the ioctl reads and writes the one structure.
        crate::check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) }.into())?;
        let mut last = Ok(());
        for offloads in OFFLOADS {
            // SAFETY: the argument is a number.
            last = crate::check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, offloads) }.into()).map(drop);
            if last.is_ok() {
                break;
            }
        }
        last?;
        Ok(Tap(file))
    }

    /// Takes a copy of a far end.
    pub fn from_fd(fd: OwnedFd) -> Tap {
        Tap(File::from(fd))
    }

    /// The next packet that went out, if there is one: its length in `buffer`, of [`MAX_PACKET_BYTES`].
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            return match (&self.0).read(buffer) {
                Ok(length) => Ok(Some(length)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => Err(e),
            };
        }
    }

    /// Has a packet come in; when this returns it has gone as far as it goes.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        (&self.0).write(packet).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
