// A web server that answers each request with the SHA-256 of its body.
//
//	digests PORT
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

func main() {
	door, err := net.Listen("tcp", ":"+os.Args[1])
	if err != nil {
		panic(err)
	}
	fmt.Println("ready")
	panic(http.Serve(door, http.HandlerFunc(func(to http.ResponseWriter, request *http.Request) {
		digest := sha256.New()
		if _, err := io.Copy(digest, request.Body); err == nil {
			fmt.Fprintf(to, "%x\n", digest.Sum(nil))
		}
	})))
}
