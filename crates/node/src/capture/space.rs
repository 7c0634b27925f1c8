//! The address space of a captured process: which mapping is what, and whether it can be made again elsewhere.
//!
//! Owns the classification of mappings. Refuses to read or copy a page of anonymous memory. Invariant: a mapping that
//! is not understood is an obstacle, never passed over.

use super::shared;
use crate::files::file_ref;
use crate::hugepages;
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{FileRef, KernelMapping, Mapping, MappingKind, Space};
use dunlin_sys::foothold::Foothold;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::maps::{self, VmFlags};
use dunlin_sys::procfs::stat::Layout;
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;

/// Flags of VmFlags that a program can set and that are set again at the destination.
const CARRIED: &[&[u8; 2]] = &[
    b"gd", b"lo", b"sr", b"rr", b"dc", b"nr", b"hg", b"nh", b"mg", b"dd", b"wf", b"sl",
];

/// The mappings with their flags, from `smaps`. Walks the page tables: not for the freeze.
pub fn listing(dir: &ProcDir) -> io::Result<Vec<(maps::Mapping, VmFlags)>> {
    Ok(maps::parse_with_flags(&dir.bytes("smaps")?)?)
}

/// The mappings as they are inside the freeze, with the flags that an earlier listing had at their place: only `smaps`
/// tells flags, and it would walk all page tables.
pub fn relisting(now: Vec<maps::Mapping>, earlier: &[(maps::Mapping, VmFlags)]) -> Vec<(maps::Mapping, VmFlags)> {
    let flags = |mapping: &maps::Mapping| {
        let overlaps = |old: &&(maps::Mapping, VmFlags)| {
            old.0.start < mapping.end && mapping.start < old.0.end && old.0.inode == mapping.inode
        };
        earlier
            .iter()
            .find(overlaps)
            .map(|(_, flags)| flags.clone())
            .unwrap_or_default()
    };
    now.into_iter()
        .map(|mapping| (mapping.clone(), flags(&mapping)))
        .collect()
}

/// Makes the address space of a process portable, leaving out `hole` (our own arena).
///
/// What stands in the way is added to `obstacles`; the space is then incomplete.
pub fn read(
    pid: Pid,
    dir: &ProcDir,
    hole: (u64, u64),
    layout: Layout,
    brk: u64,
    all: &[(maps::Mapping, VmFlags)],
    obstacles: &mut Vec<Obstacle>,
) -> io::Result<Space> {
    let mut files = FileTable::default();
    let mut mappings = Vec::with_capacity(all.len());
    for (mapping, flags) in all {
        let inside = mapping.start >= hole.0 && mapping.end <= hole.1;
        // Another arena is that of a move whose daemon was killed: the program knows nothing of it.
        if inside || Foothold::is_arena(mapping) || mapping.name == b"[vsyscall]" {
            continue;
        }
        match classify(dir, mapping, flags, &mut files)? {
            Ok(kind) => mappings.push(portable(mapping, flags, kind)),
            Err((why, hint)) => {
                obstacles.push(obstacle::mapping(
                    pid,
                    (mapping.start, mapping.end),
                    &mapping.name,
                    why,
                    hint,
                ));
            }
        }
    }
    if hugepages::total(&mappings) > hugepages::MAX_BYTES {
        obstacles.push(obstacle::obstacle(
            pid,
            "memory",
            format_args!("process {pid}"),
            hugepages::TOO_LARGE,
            "use transparent huge pages (madvise)",
        ));
    }
    let l = layout;
    Ok(Space {
        layout: [
            l.start_code,
            l.end_code,
            l.start_data,
            l.end_data,
            l.start_brk,
            brk,
            l.start_stack,
            l.arg_start,
            l.arg_end,
            l.env_start,
            l.env_end,
        ],
        auxv: dir.bytes("auxv")?,
        exe: exe(pid, dir, obstacles)?,
        files: files.files,
        mappings,
        vdso_hash: vdso_hash(dir, all)?,
    })
}

fn exe(pid: Pid, dir: &ProcDir, obstacles: &mut Vec<Obstacle>) -> io::Result<FileRef> {
    let exe = file_ref(&dir.path("exe"))?;
    if exe.path.ends_with(b" (deleted)") {
        obstacles.push(obstacle::obstacle(
            pid,
            "file",
            String::from_utf8_lossy(&exe.path),
            "the program's file was deleted or replaced since it was started",
            "restart the program, so that it runs from the file that is there now",
        ));
    }
    Ok(exe)
}

type Refusal = (&'static str, &'static str);

fn classify(
    dir: &ProcDir,
    mapping: &maps::Mapping,
    flags: &VmFlags,
    files: &mut FileTable,
) -> io::Result<Result<MappingKind, Refusal>> {
    let has = |flag: &[u8; 2]| flags.contains(flag);
    Ok(match mapping.name.as_slice() {
        b"[vdso]" => Ok(MappingKind::Kernel(KernelMapping::Vdso)),
        b"[vvar]" => Ok(MappingKind::Kernel(KernelMapping::Vvar)),
        b"[vvar_vclock]" => Ok(MappingKind::Kernel(KernelMapping::VvarClock)),
        b"[uprobes]" => Err(("it is being probed", "remove the uprobes on the program")),
        _ if hugepages::is(mapping) => Ok(hugepages::classify(
            &dir.path(&format!("map_files/{:x}-{:x}", mapping.start, mapping.end)),
        )?),
        _ if has(b"ht") => Err((
            "shared memory of explicit huge pages, or of a file in hugetlbfs, cannot be moved yet",
            "use transparent huge pages (madvise)",
        )),
        _ if has(b"ss") => Err((
            "it is a shadow stack",
            "start the program without shadow stacks (GLIBC_TUNABLES)",
        )),
        _ if has(b"pf") || has(b"io") => Err((
            "it is memory of a device",
            "close the device; processes that drive hardware stay where it is",
        )),
        _ if !mapping.has_file() && !mapping.shared => Ok(MappingKind::Anonymous),
        _ if shared::is(mapping) => {
            let link = dir.path(&format!("map_files/{:x}-{:x}", mapping.start, mapping.end));
            shared::classify(mapping, &link)?
                .map_err(|why| (why, "keep the process on this node, or give it less shared memory"))
        }
        name if name.ends_with(b" (deleted)") || name.starts_with(b"/memfd:") || name.starts_with(b"/SYSV") => {
            if mapping.shared {
                Err((
                    "shared memory cannot be moved yet",
                    "stop the sharing processes, or keep them on this node",
                ))
            } else {
                Err((
                    "its file was deleted or replaced",
                    "restart the program, so that it maps the file that is there now",
                ))
            }
        }
        name if name.starts_with(b"anon_inode:") || name.starts_with(b"socket:") => Err((
            "a ring or buffer shared with the kernel cannot be moved",
            "run the program with io_uring, perf and packet rings off",
        )),
        name if !name.starts_with(b"/") => Err(("it is of an unknown kind", "please report it")),
        _ => {
            let path = dir.path(&format!("map_files/{:x}-{:x}", mapping.start, mapping.end));
            let file = files.index(mapping, &path)?;
            if files.files[file as usize].mode & libc_s_ifmt() != libc_s_ifreg() {
                Err((
                    "it maps a device",
                    "close the device; processes that drive hardware stay where it is",
                ))
            } else if mapping.shared {
                Ok(MappingKind::SharedFile {
                    file,
                    offset: mapping.offset,
                    writable: has(b"mw"),
                })
            } else {
                Ok(MappingKind::PrivateFile {
                    file,
                    offset: mapping.offset,
                })
            }
        }
    })
}

fn libc_s_ifmt() -> u32 {
    rustix::fs::FileType::Symlink.as_raw_mode()
        | rustix::fs::FileType::Fifo.as_raw_mode()
        | rustix::fs::FileType::Directory.as_raw_mode()
}

fn libc_s_ifreg() -> u32 {
    rustix::fs::FileType::RegularFile.as_raw_mode()
}

fn portable(mapping: &maps::Mapping, flags: &VmFlags, kind: MappingKind) -> Mapping {
    let protection = u32::from(mapping.read) | u32::from(mapping.write) << 1 | u32::from(mapping.execute) << 2;
    let name = mapping
        .name
        .strip_prefix(b"[anon:")
        .and_then(|n| n.strip_suffix(b"]"))
        .map(<[u8]>::to_vec);
    Mapping {
        start: mapping.start,
        end: mapping.end,
        protection,
        kind,
        flags: flags.iter().copied().filter(|f| CARRIED.contains(&f)).collect(),
        name,
    }
}

/// The files of an address space, each once.
#[derive(Default)]
struct FileTable {
    files: Vec<FileRef>,
    by_inode: HashMap<(u32, u32, u64, Vec<u8>), u32>,
}

impl FileTable {
    fn index(&mut self, mapping: &maps::Mapping, path: &std::path::Path) -> io::Result<u32> {
        let key = (mapping.device.0, mapping.device.1, mapping.inode, mapping.name.clone());
        if let Some(index) = self.by_inode.get(&key) {
            return Ok(*index);
        }
        let file = file_ref(path)?;
        // The program may run, and have another file mapped there by now.
        if file.path != mapping.name {
            return Err(io::ErrorKind::NotFound.into());
        }
        let index = self.files.len() as u32;
        self.files.push(FileRef {
            path: mapping.name.clone(),
            ..file
        });
        self.by_inode.insert(key, index);
        Ok(index)
    }
}

/// A hash of the bytes of the vDSO.
pub fn vdso_hash(dir: &ProcDir, all: &[(maps::Mapping, VmFlags)]) -> io::Result<[u8; 32]> {
    let Some((vdso, _)) = all.iter().find(|(m, _)| m.name == b"[vdso]") else {
        return Ok([0; 32]);
    };
    let mut code = vec![0u8; vdso.length() as usize];
    std::fs::File::open(dir.path("mem"))?.read_exact_at(&mut code, vdso.start)?;
    Ok(*blake3::hash(&code).as_bytes())
}
