//! Frames: a little-endian `u32` length, then that many bytes of postcard.
//!
//! Owns the framing and its bound. Refuses to know what is inside. A frame that is too long or does not parse is an
//! [`io::Error`] of kind `InvalidData`; the stream is of no further use then.

use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};

/// No frame is longer; page data travels outside frames.
pub const MAX_FRAME_BYTES: usize = 64 << 20;

/// One whole frame, ready to be written.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; 4];
    bytes = postcard::to_extend(message, bytes).map_err(invalid)?;
    let length = bytes.len() - 4;
    if length > MAX_FRAME_BYTES {
        return Err(invalid(format!(
            "a message of {length} bytes is over the bound of {MAX_FRAME_BYTES}"
        )));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// Writes one frame with a single `write_all`.
pub fn write<T: Serialize>(to: &mut impl Write, message: &T) -> io::Result<()> {
    to.write_all(&encode(message)?)
}

/// Reads one frame. The end of the stream before its first byte is `UnexpectedEof`, as is one inside it.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut length = [0u8; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(invalid(format!(
            "a frame of {length} bytes is over the bound of {MAX_FRAME_BYTES}"
        )));
    }
    let mut bytes = Vec::new();
    // `take` lets the buffer grow with what arrives, so that a lying length costs the liar bandwidth, not us memory.
    from.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    postcard::from_bytes(&bytes).map_err(invalid)
}

fn invalid(why: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        write(&mut bytes, &("page", 7u64)).unwrap();
        write(&mut bytes, &("next", 8u64)).unwrap();
        let mut from = bytes.as_slice();
        assert_eq!(read::<(String, u64)>(&mut from).unwrap(), ("page".into(), 7));
        assert_eq!(read::<(String, u64)>(&mut from).unwrap(), ("next".into(), 8));
        assert_eq!(read::<u8>(&mut from).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_lying_length_is_refused() {
        let mut from: &[u8] = &[0xff, 0xff, 0xff, 0xff, 1];
        assert_eq!(read::<u8>(&mut from).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let mut from: &[u8] = &[9, 0, 0, 0, 1];
        assert_eq!(read::<u8>(&mut from).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
