//! Shared memory without a name (MAP_SHARED with MAP_ANONYMOUS), which processes have in common since one forked the others.
//!
//! Owns the look at it, and its bytes: they travel inside the freeze, once for all processes of a move. Refuses to page it on
//! demand: two nodes would have it at once. Invariant: nobody who stays has it mapped.

use super::Surroundings;
use super::descriptors::Met;
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{MappingKind, SharedBytes, Space};
use dunlin_sys::procfs::{ProcDir, maps};
use dunlin_sys::shared::NAME;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// No more of one travels: all of it is part of the freeze.
pub const MAX_BYTES: u64 = 16 << 20;
const TOO_LARGE: &str = "more than 16 MiB of shared memory cannot be moved yet";

/// What such a mapping is, by its entry in `map_files`; or why it does not move.
pub fn classify(mapping: &maps::Mapping, link: &Path) -> io::Result<Result<MappingKind, &'static str>> {
    let meta = std::fs::metadata(link)?;
    // The program may run, and have other memory there by now.
    if meta.ino() != mapping.inode {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(match meta.blocks() * 512 <= MAX_BYTES {
        true => Ok(MappingKind::SharedMemory {
            memory: mapping.inode,
            offset: mapping.offset,
            length: meta.len(),
        }),
        false => Err(TOO_LARGE),
    })
}

/// Whether a mapping is of such memory.
pub fn is(mapping: &maps::Mapping) -> bool {
    mapping.shared && mapping.name == NAME
}

/// What a process has of it, by number; nothing if it has ended.
pub fn of(host: i32) -> Vec<u64> {
    let text = ProcDir::process(host).bytes("maps").unwrap_or_default();
    let all = maps::parse(&text).unwrap_or_default();
    all.iter().filter(|m| is(m)).map(|m| m.inode).collect()
}

/// Names what somebody who stays has mapped, too.
pub fn look(pid: Pid, space: &Space, around: &Surroundings<'_>, obstacles: &mut Vec<Obstacle>) {
    for mapping in &space.mappings {
        if let MappingKind::SharedMemory { memory, .. } = mapping.kind
            && let Some(other) = around.maps_outside(memory)
        {
            obstacles.push(obstacle::mapping(
                pid,
                (mapping.start, mapping.end),
                NAME,
                format!("process {other}, which stays here, shares this memory"),
                "move the whole tree (--tree), or end the other process",
            ));
        }
    }
}

/// What is in it, of each once. The processes are frozen.
pub fn read(dir: &ProcDir, space: &Space, met: &mut Met) -> io::Result<Vec<SharedBytes>> {
    let mut all = Vec::new();
    for mapping in &space.mappings {
        let MappingKind::SharedMemory { memory, length, .. } = mapping.kind else {
            continue;
        };
        if met.is_first(memory) {
            let link = dir.path(&format!("map_files/{:x}-{:x}", mapping.start, mapping.end));
            read_one(&File::open(link)?, memory, length, &mut all)?;
        }
    }
    Ok(all)
}

fn read_one(file: &File, memory: u64, length: u64, all: &mut Vec<SharedBytes>) -> io::Result<()> {
    let (mut at, mut total) = (0, 0);
    while at < length {
        let offset = match seek(file, SeekFrom::Data(at)) {
            Ok(offset) => offset,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(offset))?.min(length);
        total += end - offset;
        if total > MAX_BYTES {
            return Err(io::Error::other(TOO_LARGE));
        }
        let mut bytes = vec![0; (end - offset) as usize];
        file.read_exact_at(&mut bytes, offset)?;
        all.push(SharedBytes { memory, offset, bytes });
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_do_not_travel() {
        let file = dunlin_sys::shared::make(64 << 20).unwrap();
        file.write_all_at(&[7; 4096], 32 << 20).unwrap();
        let mut all = Vec::new();
        read_one(&file, 9, 64 << 20, &mut all).unwrap();
        let total: usize = all.iter().map(|part| part.bytes.len()).sum();
        assert!(total < 4 << 20, "{total}");
        let has = |part: &SharedBytes| {
            let at = (32 << 20) - part.offset as usize;
            part.memory == 9 && part.bytes[at..at + 4096] == [7; 4096]
        };
        assert!(all.iter().any(has));
        file.write_all_at(&vec![1; MAX_BYTES as usize + 1], 0).unwrap();
        assert!(read_one(&file, 9, 64 << 20, &mut all).is_err());
    }
}
