//! Tables for people.
//!
//! Owns the alignment. Refuses to know what is in the cells.

/// Lines of cells under headings, columns aligned (numbers, where `right` says so, at their last digit), each line cut to
/// the width if there is one.
pub fn aligned<const N: usize>(
    headings: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
    right: [bool; N],
    width: Option<usize>,
) -> String {
    let mut lines = vec![headings.map(str::to_owned)];
    lines.extend(rows);
    let mut widths = [0; N];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in &lines {
        let mut out = String::new();
        for ((cell, width), right) in line.iter().zip(widths).zip(right) {
            let padding = " ".repeat(width - cell.chars().count());
            let (before, after) = if right { (&*padding, "") } else { ("", &*padding) };
            out.extend([before, cell, after, " "]);
        }
        let out = out.trim_end();
        text.extend(out.chars().take(width.unwrap_or(usize::MAX)));
        text.push('\n');
    }
    text
}
