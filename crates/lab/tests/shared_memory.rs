//! Memory that processes share moves with all of them, or not at all.

mod support;

use dunlin_lab::harness::{NotMoved, request};
use dunlin_lab::{Lab, Options};
use support::obedient::Obedient;
use support::{JOURNEY, Workshop};

#[test]
fn parent_and_child_go_on_writing_to_each_other() {
    let (lab, workshop) = (
        Lab::up("shared-tree", &Options::default()),
        Workshop::new("shared-tree"),
    );
    let (mut parent, _run) = Obedient::start(&lab, &workshop, "parent");
    parent.ask("m = mmap.mmap(-1, 64 << 20)");
    parent.ask("m[5 << 20: 5 << 20 | 5] = b'begin'");
    // A part of it that only reads, with another offset: the same memory.
    parent.ask(
        "ctypes.CDLL(None).mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(m)) + 4096), 8192, 1)",
    );
    let mut child = parent.fork("child");
    match lab.move_as(request(parent.pid, "n2")) {
        Err(NotMoved::Refused(obstacles)) => {
            let words = format!("{obstacles:?}");
            assert!(words.contains("shares this memory"), "{words}");
            assert!(words.contains("--tree"), "{words}");
        }
        other => panic!("a process went away from memory that another has: {other:?}"),
    }
    for (n, node) in JOURNEY.into_iter().enumerate() {
        child.ask(&format!("m[0:4] = b'{n:4}'"));
        parent.ask(&format!("m[63 << 20: 63 << 20 | 4] = b'{n:4}'"));
        lab.move_tree(parent.pid, node);
        assert_eq!(child.ask("m[63 << 20: 63 << 20 | 4]"), format!("b'{n:4}'"), "on {node}");
        assert_eq!(parent.ask("m[0:4]"), format!("b'{n:4}'"), "on {node}");
        assert_eq!(child.ask("m[5 << 20: 5 << 20 | 5]"), "b'begin'", "on {node}");
        parent.ask("m[100:103] = b'now'");
        assert_eq!(child.ask("m[100:103]"), "b'now'", "on {node}");
        child.ask("m[100:103] = b'...'");
    }
}

#[test]
fn a_process_with_too_much_of_it_stays() {
    let (lab, workshop) = (Lab::up("shared-big", &Options::default()), Workshop::new("shared-big"));
    let (mut program, _run) = Obedient::start(&lab, &workshop, "one");
    program.ask("m = mmap.mmap(-1, 32 << 20)");
    lab.move_verified(program.pid, "n2");
    program.ask("m.write(b'x' * (17 << 20))");
    match lab.move_as(request(program.pid, "n3")) {
        Err(NotMoved::Refused(obstacles)) => {
            let words = format!("{obstacles:?}");
            assert!(words.contains("16 MiB"), "{words}");
        }
        other => panic!("more moved than it is said: {other:?}"),
    }
    program.ask("m.madvise(9)"); // MADV_REMOVE
    lab.move_verified(program.pid, "n3");
    assert_eq!(program.ask("m[:3]"), "b'\\x00\\x00\\x00'");
}
