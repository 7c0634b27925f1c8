//! Compiles the BPF programs (bpf/*.bpf.c) with clang, for the kernel's BPF machine.

use std::path::PathBuf;
use std::process::Command;

const PROGRAMS: [&str; 2] = ["steer", "porter"];

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    PROGRAMS.into_iter().for_each(compile);
}

fn compile(program: &str) {
    let clang = std::env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join(format!("{program}.bpf.o"));
    let mut compile = Command::new(&clang);
    compile.args([
        "-target",
        "bpf",
        "-mcpu=v3",
        "-O2",
        "-g",
        "-Wall",
        "-Werror",
        "-Wno-unused-function",
    ]);
    // Where Debian keeps asm/types.h, which the kernel's headers include; clang looks there only for its own target.
    compile.arg(format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH));
    compile.args(["-c", &format!("bpf/{program}.bpf.c"), "-o"]).arg(&out);
    match compile.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{compile:?}: {status}\nhint: it needs clang 14 or later and linux-libc-dev"),
        Err(e) => panic!(
            "{}: {e}\nhint: apt-get install clang linux-libc-dev, or set CLANG; scripts/prepare does it",
            clang.display()
        ),
    }
}
