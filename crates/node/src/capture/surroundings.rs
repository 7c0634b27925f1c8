//! What a capture must know of the processes around the captured ones.
//!
//! Owns the questions "does anybody who stays hold this too?". Refuses to change anything.

use super::shared;
use crate::edge::Inside;
use dunlin_proto::ids::{Pid, RunId};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::socket::{in_network, unix};
use std::cell::{OnceCell, RefCell};
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
    /// Host numbers of all that hold nothing of a program's: surrogates, keepers.
    others: Vec<i32>,
    /// The addresses of the nest.
    pub inside: Option<Inside>,
    holders: OnceCell<HashMap<(u64, u64), Pid>>,
    /// Those that came since, and what they hold.
    newcomers: RefCell<HashMap<i32, Vec<(u64, u64)>>>,
    diagnosis: OnceCell<OwnedFd>,
    sockets: OnceCell<HashSet<u64>>,
    memories: OnceCell<HashMap<u64, Pid>>,
}

impl<'a> Surroundings<'a> {
    /// The surroundings of `moving` among `staying`.
    pub fn new(
        identify: &'a dyn Fn(BorrowedFd<'_>) -> Option<(RunId, u8)>,
        moving: Vec<i32>,
        staying: Vec<(i32, Pid)>,
        others: Vec<i32>,
        inside: Option<Inside>,
    ) -> Surroundings<'a> {
        Surroundings {
            identify,
            moving,
            staying,
            others,
            inside,
            holders: OnceCell::new(),
            newcomers: RefCell::default(),
            diagnosis: OnceCell::new(),
            sockets: OnceCell::new(),
            memories: OnceCell::new(),
        }
    }

    /// A frozen process has this child. If it forked it since we looked, and what that one has forked since, it stays too,
    /// and has its parent's descriptors.
    pub fn meet(&self, host: i32) {
        let is_known = self.moving.contains(&host)
            || self.others.contains(&host)
            || self.staying.iter().any(|(other, _)| *other == host)
            || self.newcomers.borrow().contains_key(&host);
        if is_known {
            return;
        }
        self.newcomers.borrow_mut().insert(host, held(host));
        let dir = ProcDir::process(host);
        for tid in dir.threads().unwrap_or_default() {
            let children = dir.text(&format!("task/{tid}/children")).unwrap_or_default();
            for child in children.split_ascii_whitespace().filter_map(|n| n.parse().ok()) {
                self.meet(child);
            }
        }
    }

    /// Looks at all that may be asked later, so that no looking falls into a freeze.
    pub fn look(&self) {
        self.holders();
        // Whoever needs it will ask again, and be told why not.
        let _ = self.diagnosis();
    }

    /// Nobody stays who could hold anything.
    pub fn is_alone(&self) -> bool {
        self.staying.is_empty() && self.newcomers.borrow().is_empty()
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
        let file = (meta.dev(), meta.ino());
        let newly = self.newcomers.borrow().values().any(|held| held.contains(&file));
        Ok(newly || self.holders().contains_key(&file))
    }

    /// A process that stays and has this pipe or socket open.
    pub fn open_outside(&self, inode: u64) -> io::Result<Option<Pid>> {
        let newcomers = self.newcomers.borrow();
        let newly = newcomers
            .iter()
            .find(|(_, held)| held.iter().any(|(_, ino)| *ino == inode));
        if let Some((host, _)) = newly {
            return Ok(Some(number_of(*host)));
        }
        Ok(self
            .holders()
            .iter()
            .find(|((_, ino), _)| *ino == inode)
            .map(|(_, pid)| *pid))
    }

    /// A process that stays and has this shared memory mapped.
    pub fn maps_outside(&self, memory: u64) -> Option<Pid> {
        let newcomers = self.newcomers.borrow();
        if let Some(host) = newcomers.keys().find(|host| shared::of(**host).contains(&memory)) {
            return Some(number_of(*host));
        }
        let memories = self.memories.get_or_init(|| {
            let all = self.staying.iter();
            all.flat_map(|(host, pid)| shared::of(*host).into_iter().map(|memory| (memory, *pid)))
                .collect()
        });
        memories.get(&memory).copied()
    }

    fn holders(&self) -> &HashMap<(u64, u64), Pid> {
        self.holders.get_or_init(|| {
            let mut holders = HashMap::new();
            for (host, pid) in &self.staying {
                holders.extend(held(*host).into_iter().map(|file| (file, *pid)));
            }
            holders
        })
    }
}

/// Its number in the nest; 0 if it has ended.
fn number_of(host: i32) -> Pid {
    let status = ProcDir::process(host).status();
    let pid = status.ok().and_then(|status| status.ns_pids.last().copied());
    Pid(pid.unwrap_or(0))
}

/// What a process has open: devices and inodes. One that has ended meanwhile holds nothing.
fn held(host: i32) -> Vec<(u64, u64)> {
    let dir = ProcDir::process(host);
    let numbers = dir.numbers("fd").unwrap_or_default();
    let metas = numbers
        .into_iter()
        .filter_map(|number| std::fs::metadata(dir.path(&format!("fd/{number}"))).ok());
    metas.map(|meta| (meta.dev(), meta.ino())).collect()
}
