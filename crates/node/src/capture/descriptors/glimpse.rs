//! A descriptor table as /proc shows it.
//!
//! Owns what is cheap to read of each descriptor, and enough to see whether anything changed. Refuses to open one.

use dunlin_sys::procfs::fdinfo::FdInfo;
use dunlin_sys::procfs::{Descriptors, ProcDir};
use std::io;
use std::path::PathBuf;

const O_ACCMODE: u32 = 0o3;

/// One descriptor as /proc shows it: cheap to read, and enough to see whether anything changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glimpse {
    pub(crate) number: i32,
    pub(crate) link: PathBuf,
    pub(crate) info: FdInfo,
    /// The lines of fdinfo that change only when somebody changes the descriptor.
    pub(crate) steady: String,
}

impl Glimpse {
    /// One descriptor of a process; `None` if it was closed meanwhile, which inside a freeze cannot happen.
    pub(crate) fn of(dir: &ProcDir, number: i32) -> io::Result<Option<Glimpse>> {
        let (Ok(link), Ok(text)) = (dir.link(&format!("fd/{number}")), dir.text(&format!("fdinfo/{number}"))) else {
            return Ok(None);
        };
        Glimpse::from_texts(number, link, &text).map(Some)
    }

    /// The same in a table of which many are read.
    fn at(table: &Descriptors, number: i32, buffer: &mut Vec<u8>) -> io::Result<Option<Glimpse>> {
        let (Ok(link), Ok(())) = (table.link(number), table.info_into(number, buffer)) else {
            return Ok(None);
        };
        Glimpse::from_texts(number, link, &String::from_utf8_lossy(buffer)).map(Some)
    }

    fn from_texts(number: i32, link: PathBuf, text: &str) -> io::Result<Glimpse> {
        let info = FdInfo::parse(text)?;
        let passes = |line: &&str| {
            !["pos:", "flags:", "ticks:", "it_value:"]
                .iter()
                .any(|key| line.starts_with(key))
        };
        Ok(Glimpse {
            number,
            link,
            info,
            steady: text.lines().filter(passes).flat_map(|line| [line, "\n"]).collect(),
        })
    }

    /// Could it be the same description?
    pub(crate) fn is_like(&self, other: &Glimpse) -> bool {
        // A name alone may be given to another file: of two without a name, or after a rename.
        let same = |key: &str| self.line(key) == other.line(key);
        let access = |glimpse: &Glimpse| glimpse.info.flags & O_ACCMODE;
        self.link == other.link && access(self) == access(other) && same("ino:") && same("eventfd-id:")
    }

    /// Is what has its name one description for certain, whoever has it?
    pub(super) fn names_one(&self) -> bool {
        self.link.as_os_str().as_encoded_bytes().starts_with(b"socket:") || self.line("eventfd-id:").is_some()
    }

    /// A line of fdinfo.
    fn line(&self, key: &str) -> Option<&str> {
        self.steady.lines().find(|line| line.starts_with(key))
    }
}

impl Glimpse {
    /// Its number.
    pub fn number(&self) -> i32 {
        self.number
    }

    /// Its name, as /proc has it.
    pub fn link(&self) -> &std::path::Path {
        &self.link
    }

    /// The offset.
    pub fn position(&self) -> u64 {
        self.info.position
    }
}

/// Reads the table as /proc shows it.
pub fn glimpse(dir: &ProcDir) -> io::Result<Vec<Glimpse>> {
    let mut numbers = dir.numbers("fd")?;
    let table = dir.descriptors()?;
    let parts = in_two(&mut numbers, |part| -> io::Result<Vec<Glimpse>> {
        let mut buffer = Vec::new();
        let each = part
            .iter()
            .map(|number| Glimpse::at(&table, *number, &mut buffer).transpose());
        each.flatten().collect()
    })?;
    Ok(parts.into_iter().flatten().collect())
}

/// Works on the halves of many at once, on few in one go. What comes of it is in their order.
pub(crate) fn in_two<T: Send, R: Send, E: Send>(
    all: &mut [T],
    work: impl Fn(&mut [T]) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    const FEW: usize = 128;
    if all.len() < FEW {
        return Ok(vec![work(all)?]);
    }
    let (one, other) = all.split_at_mut(all.len() / 2);
    std::thread::scope(|scope| {
        let there = scope.spawn(|| work(other));
        let here = work(one);
        let there = there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(vec![here?, there?])
    })
}
