//! The descriptor table of a captured process.
//!
//! Owns what each descriptor is and which descriptors share one open file description. Refuses to keep any of them
//! open longer than it takes to look. Invariant: a descriptor that is not understood is an obstacle.

use crate::capture::Surroundings;
use crate::files::{contents, file_ref};
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{self, Description, DescriptionKind, Descriptor, FileLock, Files};
use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::inspect;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::fdinfo::{FdInfo, Lock, LockKind};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

const O_CLOEXEC: u32 = 0o2_000_000;
const O_APPEND: u32 = 0o2000;
const O_PATH: u32 = 0o10_000_000;
const O_ACCMODE: u32 = 0o3;
const S_IFMT: u32 = 0o170_000;
/// A deleted file travels whole, before and inside the freeze; a larger one is refused.
const MAX_DELETED_BYTES: u64 = 256 << 20;

/// One descriptor as /proc shows it: cheap to read, and enough to see whether anything changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glimpse {
    number: i32,
    link: PathBuf,
    info: FdInfo,
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
    let mut all = Vec::new();
    for number in dir.numbers("fd")? {
        // A descriptor that was closed meanwhile is not there; inside a freeze this cannot happen.
        let (Ok(link), Ok(info)) = (dir.link(&format!("fd/{number}")), dir.text(&format!("fdinfo/{number}"))) else {
            continue;
        };
        all.push(Glimpse {
            number,
            link,
            info: FdInfo::parse(&info)?,
        });
    }
    Ok(all)
}

/// An open file description that was already met, in this process or in another of the same move.
#[derive(Debug, Clone)]
pub struct Met {
    host: i32,
    number: i32,
    glimpse: Glimpse,
    key: u64,
}

/// Reads what the descriptors are. Descriptions met before (in `met`) keep their key.
pub fn read(
    pid: Pid,
    host: i32,
    glimpses: &[Glimpse],
    around: &Surroundings<'_>,
    met: &mut Vec<Met>,
    obstacles: &mut Vec<Obstacle>,
) -> io::Result<Files> {
    let mut files = Files::default();
    let dir = ProcDir::process(host);
    for glimpse in glimpses {
        let key = match known(host, glimpse, met)? {
            Some(key) => key,
            None => {
                let key = met.len() as u64 + 1;
                met.push(Met {
                    host,
                    number: glimpse.number,
                    glimpse: glimpse.clone(),
                    key,
                });
                key
            }
        };
        let index = match files.descriptions.iter().position(|d| d.key == key) {
            Some(index) => index,
            None => match describe(pid, host, &dir, glimpse, around)? {
                Ok(kind) => {
                    files.descriptions.push(Description {
                        key,
                        kind,
                        flags: glimpse.info.flags & !O_CLOEXEC,
                        position: glimpse.info.position,
                        owner: None,
                        locks: locks(&glimpse.info),
                    });
                    files.descriptions.len() - 1
                }
                Err(obstacle) => {
                    obstacles.push(*obstacle);
                    continue;
                }
            },
        };
        files.table.push(Descriptor {
            number: glimpse.number,
            description: index as u32,
            close_on_exec: glimpse.info.flags & O_CLOEXEC != 0,
        });
    }
    Ok(files)
}

fn known(host: i32, glimpse: &Glimpse, met: &[Met]) -> io::Result<Option<u64>> {
    let alike = |m: &&Met| {
        m.glimpse.link == glimpse.link
            && m.glimpse.info.position == glimpse.info.position
            && (m.glimpse.info.flags ^ glimpse.info.flags) & !O_CLOEXEC == 0
    };
    for m in met.iter().filter(alike) {
        if inspect::same_description((host, m.host), (glimpse.number, m.number))? {
            return Ok(Some(m.key));
        }
    }
    Ok(None)
}

fn locks(info: &FdInfo) -> Vec<FileLock> {
    let portable = |lock: &Lock| {
        let kind = match lock.kind {
            LockKind::Posix => image::LockKind::Process,
            LockKind::OpenFile => image::LockKind::Description,
            LockKind::Flock => image::LockKind::Whole,
            // Refused before.
            LockKind::Lease => return None,
        };
        Some(FileLock {
            kind,
            write: lock.write,
            start: lock.start,
            length: lock.last.map_or(0, |last| last.saturating_sub(lock.start) + 1),
        })
    };
    info.locks.iter().filter_map(portable).collect()
}

type Refusal = Box<Obstacle>;

fn describe(
    pid: Pid,
    host: i32,
    dir: &ProcDir,
    glimpse: &Glimpse,
    around: &Surroundings<'_>,
) -> io::Result<Result<DescriptionKind, Refusal>> {
    let what = glimpse.link.display();
    let refuse = |why: &str, hint: &str| {
        Ok(Err(Box::new(obstacle::descriptor(
            pid,
            glimpse.number,
            &what,
            why,
            hint,
        ))))
    };
    if glimpse.info.locks.iter().any(|lock| lock.kind == LockKind::Lease) {
        return refuse(
            "it holds a lease (F_SETLEASE), of which the other node's kernel would not know",
            "turn leases off in the program (kernel oplocks, in Samba)",
        );
    }
    let link = dir.path(&format!("fd/{}", glimpse.number));
    let text = glimpse.link.as_os_str().as_encoded_bytes();
    if text.starts_with(b"anon_inode:") {
        if text == b"anon_inode:[eventfd]" {
            let info = dir.text(&format!("fdinfo/{}", glimpse.number))?;
            if let Some(kind) = event(&info) {
                return Ok(Ok(kind));
            }
        }
        return refuse(
            "a descriptor of this kind cannot be moved yet",
            "see `dunlin can-move` after closing it, or run the program without the feature that needs it",
        );
    }
    if text.starts_with(b"socket:") {
        return refuse(
            "sockets cannot be moved yet",
            "close the connection, or keep the process on this node",
        );
    }
    let file = file_ref(&link)?;
    if glimpse.info.flags & O_PATH != 0 {
        if text.starts_with(b"/") && !text.ends_with(b" (deleted)") {
            return Ok(Ok(DescriptionKind::Path(file)));
        }
        return refuse(
            "it is open as a path only (O_PATH), and the path is gone",
            "close it before the move",
        );
    }
    let identify = || -> io::Result<Option<DescriptionKind>> {
        let fd = take_descriptor(host, glimpse.number)?;
        Ok((around.identify)(fd.as_fd()).map(|(run, stream)| DescriptionKind::Stream { run, stream }))
    };
    match file.mode & S_IFMT {
        0o040_000 => Ok(Ok(DescriptionKind::Directory(file))),
        0o100_000 if text.ends_with(b" (deleted)") => {
            if text.starts_with(b"/memfd:") {
                return refuse(
                    "shared memory (memfd) cannot be moved yet",
                    "close it, or keep the process on this node",
                );
            }
            if file.size > MAX_DELETED_BYTES {
                return refuse(
                    "it has no name and is too large to travel (256 MiB)",
                    "close it before the move",
                );
            }
            if around.shared_outside(host, &link)? {
                return refuse(
                    "it has no name and another process has it open",
                    "move the tree, or close it",
                );
            }
            let path = text[..text.len() - b" (deleted)".len()].to_vec();
            // Its bytes are read when everything else is known to be fine, and again in the freeze.
            Ok(Ok(DescriptionKind::Deleted {
                path,
                mode: file.mode & 0o7777,
                bytes: contents(&link, MAX_DELETED_BYTES)?,
            }))
        }
        0o100_000 if is_of_kernel(&link)? => Ok(Ok(DescriptionKind::Kernel(file))),
        0o100_000 => {
            let writes = glimpse.info.flags & O_ACCMODE != 0;
            let offset_matters = glimpse.info.flags & O_APPEND == 0;
            if writes && offset_matters && around.shared_outside(host, &link)? {
                return refuse(
                    "a process that stays here writes through the same open file description",
                    "move the tree (--tree), or open the file with O_APPEND",
                );
            }
            Ok(Ok(DescriptionKind::File(file)))
        }
        0o020_000 => match text {
            b"/dev/null" | b"/dev/zero" | b"/dev/full" | b"/dev/random" | b"/dev/urandom" => {
                Ok(Ok(DescriptionKind::Device(file)))
            }
            _ => match identify()? {
                Some(kind) => Ok(Ok(kind)),
                None => refuse(
                    "a device or a foreign terminal cannot be moved",
                    "start the program with `dunlin run`",
                ),
            },
        },
        0o010_000 => match identify()? {
            Some(kind) => Ok(Ok(kind)),
            None => around.pipe(pid, host, dir, glimpse.number, &glimpse.link, glimpse.info.flags),
        },
        _ => refuse("a descriptor of this kind cannot be moved", "close it before the move"),
    }
}

/// Whether a file is one of /proc or /sys: its bytes are made when it is read, and its times say nothing.
pub(super) fn is_of_kernel(link: &std::path::Path) -> io::Result<bool> {
    const PROC_SUPER_MAGIC: i64 = 0x9fa0;
    const SYSFS_MAGIC: i64 = 0x6265_6572;
    Ok(matches!(
        rustix::fs::statfs(link)?.f_type,
        PROC_SUPER_MAGIC | SYSFS_MAGIC
    ))
}

fn event(info: &str) -> Option<DescriptionKind> {
    let value = |key: &str| info.lines().find_map(|l| l.strip_prefix(key)).map(str::trim);
    Some(DescriptionKind::Event {
        count: u64::from_str_radix(value("eventfd-count:")?, 16).ok()?,
        semaphore: value("eventfd-semaphore:").is_some_and(|v| v == "1"),
    })
}

/// Puts the bytes of a pipe into its first reading end's description, once in a whole move.
pub fn pipe_kind(
    pid: Pid,
    host: i32,
    dir: &ProcDir,
    number: i32,
    link: &std::path::Path,
    flags: u32,
    around: &Surroundings<'_>,
) -> io::Result<Result<DescriptionKind, Refusal>> {
    let meta = std::fs::metadata(dir.path(&format!("fd/{number}")))?;
    use std::os::unix::fs::MetadataExt;
    let inode = meta.ino();
    if !link.as_os_str().as_encoded_bytes().starts_with(b"pipe:") {
        return Ok(Err(Box::new(obstacle::descriptor(
            pid,
            number,
            link.display(),
            "a named pipe (FIFO) cannot be moved yet",
            "use an unnamed pipe inside a tree that moves as a whole (--tree)",
        ))));
    }
    if let Some(other) = around.pipe_outside(inode)? {
        return Ok(Err(Box::new(obstacle::descriptor(
            pid,
            number,
            link.display(),
            &format!("process {other}, which stays here, has the pipe open"),
            "move the whole pipeline (--tree on its shell)",
        ))));
    }
    let fd = take_descriptor(host, number)?;
    let write = flags & O_ACCMODE == 1;
    Ok(Ok(DescriptionKind::Pipe {
        pipe: inode,
        write,
        capacity: rustix::pipe::fcntl_getpipe_size(&fd)? as u32,
        bytes: Vec::new(),
    }))
}

/// Fills in the bytes of pipes, without taking them out: with the first reading end of each.
pub fn read_pipes(host: i32, files: &mut Files) -> io::Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    for index in 0..files.descriptions.len() {
        let number = files
            .table
            .iter()
            .find(|d| d.description == index as u32)
            .map(|d| d.number);
        if let (
            DescriptionKind::Pipe {
                pipe,
                write: false,
                capacity,
                bytes,
            },
            Some(number),
        ) = (&mut files.descriptions[index].kind, number)
            && seen.insert(*pipe)
        {
            *bytes = peek_pipe(host, number, *capacity)?;
        }
    }
    Ok(())
}

fn peek_pipe(host: i32, number: i32, capacity: u32) -> io::Result<Vec<u8>> {
    use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, tee};
    let original = take_descriptor(host, number)?;
    let (copy_out, copy_in) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&copy_in, capacity as usize)?;
    match tee(&original, &copy_in, capacity as usize, SpliceFlags::NONBLOCK) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
        Err(error) => return Err(error.into()),
    }
    drop(copy_in);
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut std::fs::File::from(copy_out), &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_counter_is_read() {
        let info = "pos:\t0\nflags:\t02\neventfd-count:               1f\neventfd-id: 3\neventfd-semaphore: 1\n";
        assert_eq!(
            event(info),
            Some(DescriptionKind::Event {
                count: 0x1f,
                semaphore: true
            })
        );
        assert_eq!(event("pos:\t0\n"), None);
    }
}
