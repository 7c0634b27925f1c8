//! What a capture must know of the processes around the captured ones.
//!
//! Owns the questions "does anybody who stays hold this too?". Refuses to change anything.

use dunlin_proto::ids::{Pid, RunId};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::socket::{in_network, unix};
use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The processes around the captured ones.
pub struct Surroundings<'a> {
    /// Names a standard stream of a run by its local end.
    pub identify: &'a dyn Fn(BorrowedFd<'_>) -> Option<(RunId, u8)>,
    /// Host numbers of the processes that move.
    pub moving: Vec<i32>,
    /// Host numbers and PIDs of all other processes of the nest.
    pub staying: Vec<(i32, Pid)>,
    holders: OnceCell<HashMap<(u64, u64), Pid>>,
    diagnosis: OnceCell<OwnedFd>,
    sockets: OnceCell<HashSet<u64>>,
}

impl<'a> Surroundings<'a> {
    /// The surroundings of `moving` among `staying`.
    pub fn new(
        identify: &'a dyn Fn(BorrowedFd<'_>) -> Option<(RunId, u8)>,
        moving: Vec<i32>,
        staying: Vec<(i32, Pid)>,
    ) -> Surroundings<'a> {
        Surroundings {
            identify,
            moving,
            staying,
            holders: OnceCell::new(),
            diagnosis: OnceCell::new(),
            sockets: OnceCell::new(),
        }
    }

    /// Looks at all that may be asked later, so that no looking falls into a freeze.
    pub fn look(&self) {
        self.holders();
        // Whoever needs it will ask again, and be told why not.
        let _ = self.diagnosis();
    }

    /// Tells of the sockets of the nest.
    pub fn diagnosis(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(socket) = self.diagnosis.get() {
            return Ok(socket.as_fd());
        }
        let host = self.moving.first().copied().unwrap_or_default();
        let network = std::fs::File::open(ProcDir::process(host).path("ns/net"))?;
        let socket = in_network(network.as_fd(), unix::diagnosis)??;
        Ok(self.diagnosis.get_or_init(|| socket).as_fd())
    }

    /// Whether a process that moves has a socket open, by its inode.
    pub fn moves(&self, socket: u64) -> io::Result<bool> {
        if let Some(sockets) = self.sockets.get() {
            return Ok(sockets.contains(&socket));
        }
        let mut found = HashSet::new();
        for host in &self.moving {
            let dir = ProcDir::process(*host);
            for number in dir.numbers("fd")? {
                let link = dir.link(&format!("fd/{number}")).unwrap_or_default();
                let inode = link
                    .to_str()
                    .and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']'));
                found.extend(inode.and_then(|inode| inode.parse::<u64>().ok()));
            }
        }
        Ok(self.sockets.get_or_init(|| found).contains(&socket))
    }

    /// Whether a process that stays has the file behind this link open (through whatever description: the check errs
    /// on the safe side).
    pub fn shared_outside(&self, _host: i32, link: &Path) -> io::Result<bool> {
        let meta = std::fs::metadata(link)?;
        Ok(self.holders().contains_key(&(meta.dev(), meta.ino())))
    }

    /// A process that stays and has this pipe or socket open.
    pub fn open_outside(&self, inode: u64) -> io::Result<Option<Pid>> {
        Ok(self
            .holders()
            .iter()
            .find(|((_, ino), _)| *ino == inode)
            .map(|(_, pid)| *pid))
    }

    fn holders(&self) -> &HashMap<(u64, u64), Pid> {
        self.holders.get_or_init(|| {
            let mut holders = HashMap::new();
            for (host, pid) in &self.staying {
                let dir = ProcDir::process(*host);
                // A process that has ended meanwhile holds nothing.
                for number in dir.numbers("fd").unwrap_or_default() {
                    if let Ok(meta) = std::fs::metadata(dir.path(&format!("fd/{number}"))) {
                        holders.insert((meta.dev(), meta.ino()), *pid);
                    }
                }
            }
            holders
        })
    }
}
